"""CLIP, SLIP, FILIP, DeCLIP and DeFILIP on Flickr8k: the same towers, data and number of pairs seen
(15 epochs at batch 128), each with its own augmentation; then what explains DeCLIP's row: DeCLIP
with CLIP's augmentation, and without each of its terms. $FLICKR8K, $CIFAR10 and $TINY_IMAGENET name
the folders of the data."""

from clipx.configs import clip, common, declip, defilip, filip, slip

_METHODS = {"clip": clip, "slip": slip, "filip": filip, "declip": declip, "defilip": defilip}
_TERMS = ("contrastive", "neighbour", "simsiam", "masked_lm")
VARIANTS = (*_METHODS, "declip_light", *(f"declip_no_{term}" for term in _TERMS))


def get_config(variant=VARIANTS[0]):
    method = variant.split("_")[0]
    config = _METHODS[method].get_config("small")
    changes = {}
    if variant == "declip_light":
        light = clip.get_config("small").objective
        changes = {name: light[name] for name in ("augmentation", "crop_scale")}
    elif variant != method:
        changes = {f"{variant.removeprefix('declip_no_')}_weight": 0.0}
    config.objective = {**config.objective.to_dict(), **changes}
    return common.compared(config)
