"""CLIP and ProtoCLIP on Flickr8k, with the same towers, pictures, augmentation and number of pairs
(15 epochs at batch 128). ProtoCLIP also runs with hard targets, without back translation, and with
a teacher. $FLICKR8K, $CIFAR10 and $TINY_IMAGENET are the folders of the data, and
$FLICKR8K_TEACHER is the file that `python -m clipx.teacher` wrote."""

from clipx.configs import clip, common, protoclip

_CHANGES = {
    "clip": {},
    "protoclip": {},
    "protoclip_hard": {"target_temperature": 0.0},
    "protoclip_no_pbt": {"back_translation": False},
    "protoclip_teacher": {"external_weight": 1.0},
}
VARIANTS = tuple(_CHANGES)
CLAIMS = [
    *common.claims(
        common.PROTOCLIP,
        "protoclip",
        "clip",
        common.MORE_DATA,
        cifar10__top1="ProtoCLIP's linear probe is better on CIFAR-10",
        tiny_imagenet__top1="ProtoCLIP's linear probe is better on Tiny-ImageNet",
        cifar10_zero_shot__top1="ProtoCLIP classifies CIFAR-10 better zero-shot",
        cifar10_clusters__ami="ProtoCLIP groups the images of CIFAR-10 better by class",
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
    ),
]


def get_config(variant=VARIANTS[0]):
    method = clip if variant == "clip" else protoclip
    config = method.get_config("small")
    config.objective.update(_CHANGES[variant])
    if config.objective.get("external_weight"):
        config.data.teacher = "$FLICKR8K_TEACHER"
    return common.with_clusters(common.compared(config))
