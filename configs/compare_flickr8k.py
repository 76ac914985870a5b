"""CLIP and CLIP-Lite on Flickr8k, with the same towers, pictures, crops and number of pairs (15
epochs), at three batch sizes. $FLICKR8K, $CIFAR10 and $TINY_IMAGENET are the folders of the data.

`clip_one_b16` is CLIP with its loss on pairs of rows, so that each row has one negative, as in
CLIP-Lite. The learning rates are those with the best mean recall after two epochs, among 1e-4,
3e-4, 1e-3 and 3e-3 (not all four at batch 64 and 256); of equal ones, the smaller.
"""

from clipx.configs import clip, clip_lite, common

_METHODS = {"clip": clip, "clip_lite": clip_lite, "clip_one": clip}
_LEARNING_RATES = {
    "clip_b16": 3e-4,
    "clip_lite_b16": 3e-4,
    "clip_one_b16": 3e-4,
    "clip_b64": 1e-3,
    "clip_lite_b64": 3e-4,
    "clip_b256": 1e-3,
    "clip_lite_b256": 1e-3,
}
VARIANTS = tuple(_LEARNING_RATES)
CLAIMS = [
    claim
    for batch in (16, 64, 256)
    for claim in common.claims(
        common.CLIP_LITE,
        f"clip_lite_b{batch}",
        f"clip_b{batch}",
        common.LITE_SCALE,
        retrieval__mean_recall=f"at batch {batch}, CLIP-Lite retrieves better than CLIP",
        cifar10__top1=f"at batch {batch}, CLIP-Lite's features transfer better to CIFAR-10",
        tiny_imagenet__top1=f"at batch {batch}, they transfer better to Tiny-ImageNet",
    )
] + common.claims(
    common.CLIP_LITE,
    "clip_lite_b16",
    "clip_one_b16",
    common.LITE_SCALE,
    retrieval__mean_recall="with one negative for each, CLIP-Lite retrieves better than CLIP",
    cifar10__top1="with one negative for each, CLIP-Lite's features transfer better",
)


def get_config(variant=VARIANTS[0]):
    method, _, batch = variant.rpartition("_b")
    config = _METHODS[method].get_config("small")
    if method == "clip_one":
        config.objective.groups = int(batch) // 2
    common.compared(config, zero_shot=False)
    config.train.batch_size = int(batch)
    config.optimizer.learning_rate = _LEARNING_RATES[variant]
    return config
