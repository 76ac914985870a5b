"""CLIP, SigLIP, CLIP-Lite, DeCLIP and ProtoCLIP on Flickr8k from the same two frozen encoders, with
the same heads, batches and number of pairs (20 epochs at batch 512). The other variants explain
DeCLIP and ProtoCLIP: without one of DeCLIP's terms (`declip_no_<term>`), with hard targets, without
back translation, with the text encoder's own rows as ProtoCLIP's teacher, and with that alone.

$IMAGE_ENCODER and $TEXT_ENCODER are the encoders. $FEATURES holds their stored features of
Flickr8k's training images: `image` and `text`, and `crops`, two crops of each image for DeCLIP. The
first run adds `evals`, what the encoders make of the images and captions that all are evaluated on.
$FLICKR8K, $CIFAR10 and $TINY_IMAGENET are the folders of the data, $FLICKR8K_TEACHER is the file
that `python -m clipx.teacher` wrote.
"""

from clipx.configs import common, pretrained

_TEACHER = {"external_weight": 1.0}
_CHANGES = {
    **{method: (method, {}) for method in ("clip", "siglip", "clip_lite", "declip", "protoclip")},
    "declip_no_neighbour": ("declip", {"neighbour_weight": 0.0}),
    "declip_no_simsiam": ("declip", {"simsiam_weight": 0.0}),
    "declip_contrastive": ("declip", {"neighbour_weight": 0.0, "simsiam_weight": 0.0}),
    "protoclip_hard": ("protoclip", {"target_temperature": 0.0}),
    "protoclip_no_pbt": ("protoclip", {"back_translation": False}),
    "protoclip_teacher": ("protoclip", _TEACHER),
    "protoclip_teacher_alone": ("protoclip", {**_TEACHER, "prototype_weight": 0.0}),
}
VARIANTS = tuple(_CHANGES)
_MORE_PAIRS = "more pairs: with 6,000 the frozen features are the limit, not the loss"
CLAIMS = [
    *common.claims(
        common.DECLIP,
        "declip",
        "clip",
        _MORE_PAIRS,
        retrieval__mean_recall="DeCLIP retrieves better than CLIP from the same pairs",
        cifar10_zero_shot__top1="DeCLIP classifies CIFAR-10 better zero-shot",
        tiny_imagenet_zero_shot__top1="DeCLIP classifies Tiny-ImageNet better zero-shot",
    ),
    *(
        claim
        for name, words in (
            ("declip_no_neighbour", "neighbours help DeCLIP"),
            ("declip_no_simsiam", "SimSiam helps DeCLIP"),
            ("declip_contrastive", "neighbours and SimSiam together help DeCLIP"),
        )
        for claim in common.claims(
            common.DECLIP, "declip", name, _MORE_PAIRS, retrieval__mean_recall=words
        )
    ),
    *common.claims(
        common.CLIP_LITE,
        "clip_lite",
        "clip",
        common.LITE_SCALE,
        retrieval__mean_recall="CLIP-Lite retrieves better than CLIP at the same scale",
        cifar10_zero_shot__top1="CLIP-Lite classifies CIFAR-10 better zero-shot",
    ),
    *common.claims(
        common.PROTOCLIP,
        "protoclip",
        "clip",
        _MORE_PAIRS,
        cifar10_zero_shot__top1="ProtoCLIP classifies CIFAR-10 better zero-shot",
        tiny_imagenet_zero_shot__top1="ProtoCLIP classifies Tiny-ImageNet better zero-shot",
    ),
    *common.claims(
        common.PROTOCLIP,
        "protoclip",
        "protoclip_no_pbt",
        _MORE_PAIRS,
        retrieval__mean_recall="back translation helps retrieval",
    ),
    *common.claims(
        common.PROTOCLIP,
        "protoclip_teacher",
        "protoclip",
        _MORE_PAIRS,
        retrieval__mean_recall="an external teacher helps retrieval",
        cifar10_zero_shot__top1="an external teacher helps zero-shot classification",
    ),
]


def get_config(variant=VARIANTS[0]):
    method, changes = _CHANGES[variant]
    config = pretrained.get_config("locked")
    config.objective.name = method
    config.methods[method].objective.update(changes)
    del config.methods.declip["data"]
    for tower in ("image", "text"):
        config[tower].update({"init_from": f"${tower.upper()}_ENCODER", "cache": False})
    images = "crops" if method == "declip" else "image"
    config.data = {
        **config.data,
        "features": {
            "image": f"$FEATURES/{images}",
            "text": "$FEATURES/text",
            "evals": "$FEATURES/evals",
        },
        "teacher": "$FLICKR8K_TEACHER" if changes.get("external_weight") else None,
    }
    config = common.compared(config)
    for name in ("cifar10", "tiny_imagenet"):  # probes below the heads: the same for all variants
        del config.evals[name]
    return config
