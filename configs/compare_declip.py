"""CLIP, SLIP, FILIP, DeCLIP and DeFILIP on Flickr8k, with the same towers, data and number of pairs
(15 epochs at batch 128). The other variants explain the result of DeCLIP: DeCLIP with the
augmentation of its code (`declip_strong`), and without one of its loss terms (`declip_no_<term>`).
$FLICKR8K, $CIFAR10 and $TINY_IMAGENET are the folders of the data."""

from clipx.configs import clip, common, declip, defilip, filip, slip

_METHODS = {"clip": clip, "slip": slip, "filip": filip, "declip": declip, "defilip": defilip}
_TERMS = ("contrastive", "neighbour", "simsiam", "masked_lm")
VARIANTS = (*_METHODS, "declip_strong", *(f"declip_no_{term}" for term in _TERMS))
CLAIMS = [
    *common.claims(
        common.DECLIP,
        "declip",
        "clip",
        common.MORE_DATA,
        retrieval__mean_recall="DeCLIP retrieves better than CLIP from the same pairs",
        cifar10_zero_shot__top1="DeCLIP classifies CIFAR-10 better zero-shot",
        cifar10__top1="DeCLIP's features transfer better to CIFAR-10",
    ),
    *(
        claim
        for term in _TERMS
        for claim in common.claims(
            common.DECLIP,
            "declip",
            f"declip_no_{term}",
            common.MORE_DATA,
            retrieval__mean_recall=f"the term {term} helps DeCLIP",
        )
    ),
]


def get_config(variant=VARIANTS[0]):
    method = variant.split("_")[0]
    config = _METHODS[method].get_config("small")
    changes = {}
    if variant == "declip_strong":
        changes = {"augmentation": declip.MOCOV2_64, "crop_scale": None}
    elif variant != method:
        changes = {f"{variant.removeprefix('declip_no_')}_weight": 0.0}
    config.objective = {**config.objective.to_dict(), **changes}
    return common.compared(config)
