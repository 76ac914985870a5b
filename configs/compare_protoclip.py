"""CLIP and ProtoCLIP on Flickr8k: the same towers, pictures, augmentation and number of pairs seen
(15 epochs at batch 128). ProtoCLIP with and without back translation and a teacher, with soft and
hard targets. $FLICKR8K, $CIFAR10 and $TINY_IMAGENET name the folders of the data, and
$FLICKR8K_TEACHER the file that `python -m clipx.teacher` wrote."""

from clipx.configs import clip, common, protoclip

_CHANGES = {
    "clip": {},
    "protoclip": {},
    "protoclip_hard": {"target_temperature": 0.0},
    "protoclip_no_pbt": {"back_translation": False},
    "protoclip_teacher": {"external_weight": 1.0},
}
VARIANTS = tuple(_CHANGES)


def get_config(variant=VARIANTS[0]):
    method = clip if variant == "clip" else protoclip
    config = method.get_config("small")
    config.objective.update(_CHANGES[variant])
    if config.objective.get("external_weight"):
        config.data.teacher = "$FLICKR8K_TEACHER"
    common.compared(config)
    for name in ("cifar10", "tiny_imagenet"):
        data = config.evals[name].data
        config.evals[f"{name}_clusters"] = {"evaluator": "clustering", "data": data}
    config.evals.modality_gap = {"data": config.evals.retrieval.data}
    return config
