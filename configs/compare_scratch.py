"""The eight methods from nothing on Flickr8k: the same towers, data and number of pairs (15 epochs
at batch 128), each with its own `:small` recipe. `SEARCH` has what `--trials` tries for each,
`CLAIMS` what the papers say. $FLICKR8K, $CIFAR10 and $TINY_IMAGENET are the folders of the data.

`declip_no_<term>` is DeCLIP without one of its terms; `protoclip_no_pbt`, `protoclip_hard` and
`protoclip_teacher` are without back translation, with hard targets, and with the teacher in
$FLICKR8K_TEACHER, a file of `python -m clipx.teacher`. They take the values that the search has
chosen for DeCLIP and ProtoCLIP.
"""

from clipx.configs import clip, clip_lite, common, declip, defilip, filip, protoclip, siglip, slip

METHODS = {
    "clip": clip,
    "siglip": siglip,
    "clip_lite": clip_lite,
    "slip": slip,
    "filip": filip,
    "declip": declip,
    "defilip": defilip,
    "protoclip": protoclip,
}
_TERMS = ("contrastive", "neighbour", "simsiam", "masked_lm")
_CHANGES = {
    **{f"declip_no_{term}": {f"{term}_weight": 0.0} for term in _TERMS},
    "protoclip_no_pbt": {"back_translation": False},
    "protoclip_hard": {"target_temperature": 0.0},
    "protoclip_teacher": {"external_weight": 1.0},
}
VARIANTS = (*METHODS, *_CHANGES)

# From little to much: what the augmentation of 64-pixel images may do. A crop's least area is of
# the policy, unless `objective.crop_scale` says another.
_LIGHT = {"scale": (0.6, 1.0), "flip": True}
_MEDIUM = {
    **_LIGHT,
    "scale": (0.5, 1.0),
    "jitter": 0.8,
    "brightness": 0.2,
    "contrast": 0.2,
    "saturation": 0.2,
    "hue": 0.05,
}
_AUGMENTATIONS = ("choice", _LIGHT, _MEDIUM, declip.MOCOV2_64)
_SHARED = {
    "optimizer.learning_rate": ("log", 3e-4, 3e-3),
    "optimizer.weight_decay": ("log", 0.03, 0.5),
}
_SCALE = {"objective.logit_scale_init": ("uniform", 1.5, 3.5)}
# where the recipe has crops of its own, these have to give way
_OF_RECIPE = {"objective.crop_scale": ("choice", (0.4, 1.0), (0.6, 1.0), (0.8, 1.0))}
_OF_POLICY = {"objective.augmentation": _AUGMENTATIONS}
_DECLIP = {
    "objective.neighbour_weight": ("uniform", 0.0, 0.3),
    "objective.simsiam_weight": ("uniform", 0.0, 0.3),
    "objective.queue_size": ("choice", 256, 1024, 4096),
}
_RANGES = {
    "clip": {**_SHARED, **_SCALE, **_OF_RECIPE},
    "siglip": {
        **_SHARED,
        **_SCALE,
        **_OF_RECIPE,
        "objective.logit_bias_init": ("uniform", -12.0, -4.0),
    },
    "clip_lite": {
        **_SHARED,
        **_OF_RECIPE,
        "objective.width": ("choice", 256, 512, 1024),
        "objective.prior_weight": ("log", 0.01, 0.3),
        "objective.text_terms": ("choice", False, True),
    },
    "slip": {
        **_SHARED,
        **_SCALE,
        **_OF_RECIPE,
        "objective.ssl_weight": ("log", 0.2, 2.0),
        "objective.temperature": ("log", 0.05, 0.3),
        "objective.ssl_crop_scale": ("choice", (0.2, 1.0), (0.4, 1.0), (0.6, 1.0)),
    },
    "filip": {
        **_SHARED,
        **_OF_RECIPE,
        "objective.logit_scale_init": ("uniform", 2.5, 4.5),
        "objective.top_k": ("choice", 4, 8, None),
        "objective.token_width": ("choice", 64, 128, 256),
        "objective.contrastive_weight": ("uniform", 0.0, 1.0),
    },
    "declip": {**_SHARED, **_SCALE, **_OF_POLICY, **_DECLIP},
    "defilip": {
        **_SHARED,
        **_SCALE,
        **_OF_POLICY,
        "objective.late_interaction_weight": ("log", 0.05, 0.5),
        "objective.neighbour_weight": ("uniform", 0.0, 0.3),
        "objective.queue_size": ("choice", 256, 1024, 4096),
    },
    "protoclip": {
        **_SHARED,
        **_SCALE,
        **_OF_RECIPE,
        "objective.k": ("choice", 50, 100, 200, 500, 1000),
        "objective.target_temperature": ("log", 0.003, 0.1),
        "objective.prototype_weight": ("log", 0.2, 2.0),
    },
}
SEARCH = {
    "ranges": {**_RANGES, **{name: name.partition("_")[0] for name in _CHANGES}},
    "metric": "retrieval/mean_recall",
    "share": 1 / 3,
}


CLAIMS = [
    *common.claims(
        common.DECLIP,
        "declip",
        "clip",
        common.MORE_DATA,
        retrieval__mean_recall="DeCLIP retrieves better than CLIP from the same pairs",
        cifar10_zero_shot__top1="DeCLIP classifies CIFAR-10 better zero-shot",
        cifar10__top1="DeCLIP's features transfer better to CIFAR-10",
        tiny_imagenet__top1="DeCLIP's features transfer better to Tiny-ImageNet",
    ),
    *(
        claim
        for term, words in zip(_TERMS, ("contrastive", "neighbours'", "SimSiam's", "masked words'"))
        for claim in common.claims(
            common.DECLIP,
            "declip",
            f"declip_no_{term}",
            common.MORE_DATA,
            retrieval__mean_recall=f"the {words} term helps DeCLIP",
        )
    ),
    *common.claims(
        common.CLIP_LITE,
        "clip_lite",
        "clip",
        common.LITE_SCALE,
        retrieval__mean_recall="CLIP-Lite retrieves better than CLIP at the same scale",
        cifar10_zero_shot__top1="CLIP-Lite classifies CIFAR-10 better zero-shot",
        cifar10__top1="CLIP-Lite's features transfer better to CIFAR-10",
        tiny_imagenet__top1="CLIP-Lite's features transfer better to Tiny-ImageNet",
    ),
    *common.claims(
        common.PROTOCLIP,
        "protoclip",
        "clip",
        common.MORE_DATA,
        cifar10__top1="ProtoCLIP's linear probe is better on CIFAR-10",
        tiny_imagenet__top1="ProtoCLIP's linear probe is better on Tiny-ImageNet",
        cifar10_zero_shot__top1="ProtoCLIP classifies CIFAR-10 better zero-shot",
        cifar10_clusters__ami="ProtoCLIP groups the images of CIFAR-10 better by class",
        tiny_imagenet_clusters__ami="ProtoCLIP groups those of Tiny-ImageNet better by class",
    ),
    *common.claims(
        common.PROTOCLIP,
        "protoclip",
        "protoclip_no_pbt",
        "runs whose modality gap stays large, on more pairs",
        retrieval__mean_recall="back translation helps retrieval",
        cifar10_clusters__ami="back translation helps the grouping",
    ),
    *common.claims(
        common.PROTOCLIP,
        "protoclip_teacher",
        "protoclip",
        retrieval__mean_recall="an external teacher helps retrieval",
        cifar10_zero_shot__top1="an external teacher helps zero-shot classification",
    ),
]


def get_config(variant=VARIANTS[0]):
    changes = _CHANGES.get(variant, {})
    method = variant if variant in METHODS else variant.partition("_")[0]
    config = METHODS[method].get_config("small")
    config.objective.update(changes)
    if changes.get("external_weight"):
        config.data.teacher = "$FLICKR8K_TEACHER"
    return common.with_clusters(common.compared(config))
