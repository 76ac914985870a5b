"""Methods against each other on Flickr8k: the same towers, pictures, crops and number of pairs seen
(15 epochs), at three batches. $FLICKR8K, $CIFAR10 and $TINY_IMAGENET name the folders of the data.

`clip_one_b16` is CLIP whose rows meet in pairs, so that each has one negative, as in CLIP-Lite. The
learning rate of each method and batch is the one of 1e-4, 3e-4, 1e-3 and 3e-3 with the best mean
recall after two epochs (at 64 and 256 not all four were tried; of equals the smaller).
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


def get_config(variant=VARIANTS[0]):
    method, _, batch = variant.rpartition("_b")
    config = _METHODS[method].get_config("small")
    if method == "clip_one":
        config.objective.groups = int(batch) // 2
    common.compared(config, zero_shot=False)
    config.train.batch_size = int(batch)
    config.optimizer.learning_rate = _LEARNING_RATES[variant]
    return config
