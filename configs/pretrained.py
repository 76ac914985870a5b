"""Image-text models from two encoders that others trained, such as a timm model and a
sentence-transformers folder: name them in `image.init_from` and `text.init_from`.

`:locked` trains a linear head on each frozen tower, from features that are computed once. `:lit`
tunes the text tower too (LiT, arXiv 2111.07991), and `:lora` adapters of its attention and MLPs
(arXiv 2106.09685). `:tuned` trains everything, the towers at a tenth of the heads' rate, lower
blocks slower.

`--config.objective.name` picks the method: clip, siglip, clip_lite, declip or protoclip. Heads
start from canonical correlations (`head_init`), so that a run begins where linear CCA ends.

Where the numbers come from: width 256, dropout 0.3, batch 512, rate 3e-4, 20 epochs and the scales
of CLIP (30) and SigLIP (20) were chosen on the 1,000 validation images of Flickr8k, with
EfficientNet-Lite0 and all-MiniLM-L6-v2 and one seed; docs/few_pairs.md has what else was tried. Of
rates for the text tower one was tried. Rates for the image tower, layer decay, rank and epochs of
`:lora` were not tuned. DeCLIP's weights are its own (configs/declip.py); the queue is shorter, as
Flickr8k is. ProtoCLIP's sizes are those of configs/protoclip.py:small, CLIP-Lite's critic is
narrower than its own because its inputs are.
"""

from ml_collections import ConfigDict

from clipx.configs import common

VARIANTS = ("locked", "lit", "lora", "tuned")

_TOWER = {
    "name": "auto",
    "init_from": "",
    "embed_dim": 256,
    "head_init": "cca",
    "head_dropout": 0.3,
    "dtype": "float32",
}
_FROZEN = {  # of a tower, all but its head and adapters
    "image": "^image/(?!projection|.*lora_)",
    "text": "^text/(?!projection|.*lora_)",
}
_SCALE = {"pattern": "(^|/)logit_scale$", "weight_decay": 0.0, "clamp": (0.0, 4.6051702)}
_NO_DECAY = {"weight_decay": 0.0, "optional": True}


def _rules(**rates):
    """The factors `rates` of the learning rate for towers below their heads."""
    towers = [
        {"pattern": f"^{tower}/(?!projection){rest}", "learning_rate": rate, **decay}
        for tower, rate in rates.items()
        for rest, decay in ((".*(bias|scale)$", _NO_DECAY), ("", {}))
    ]
    return (
        _SCALE,
        *towers,
        {"pattern": "(^|/)(bias|scale|logit_bias)$", **_NO_DECAY},
        {"pattern": ""},
    )


# What differs for a method. DeCLIP's two texts are two captions of a picture, because an augmented
# one would have to pass the text tower at each step; it hides no words for the same reason.
_SCALE_30 = {"logit_scale_init": 3.4}  # where these heads' scale ends up
_CROPS = {"augmentation": "flip", "crop_scale": (0.5, 1.0)}
_METHODS = {
    "clip": {"objective": _SCALE_30},
    "siglip": {"objective": {"logit_scale_init": 3.0}},
    "clip_lite": {"objective": {"width": 512, "text_terms": True, "prior": "off"}},
    "declip": {
        "data": {"features": {"views": 2}},
        "objective": {
            **_SCALE_30,
            **_CROPS,
            "second_text": "other",
            "contrast_clean_caption": True,
            "masked_lm_weight": 0.0,
            "queue_size": 4096,
        },
    },
    "protoclip": {
        "objective": {
            **_SCALE_30,
            "k": 200,
            "episode_size": 11 * 512,  # an epoch of Flickr8k
            "with_replacement": False,
            "projection_dim": 64,
            "projection_hidden": 256,
        },
    },
}
_MASKED_WORDS = {"masked_lm_weight": 0.2, "contrast_clean_caption": False}


def _locked():
    return ConfigDict(
        {
            "objective": {"name": "clip", "augmentation": "center"},
            "image": {**_TOWER, "cache": True},
            "text": {**_TOWER, "cache": True},
            "tokenizer": {"name": "auto", "context": 32},
            "data": common.FLICKR8K,
            "train": {
                "batch_size": 512,
                "total_epochs": 20,
                "log_every_steps": 10,
                "save_every_steps": 100,
                "best": "",
            },
            "optimizer": {
                "learning_rate": 3e-4,
                "weight_decay": 0.1,
                "warmup_epochs": 1.0,
                "rules": _rules(),
                "freeze": tuple(_FROZEN.values()),
            },
            "evals": {"retrieval": common.OWN_RETRIEVAL},
            "methods": _METHODS,
        }
    )


def get_config(variant="locked"):
    config = _locked()
    if variant == "locked":
        return config
    config.text.cache = False
    config.tokenizer.context = 24  # which most captions of a line fit; each token costs time now
    if variant == "lora":
        config.text.lora_rank = 8
        config.train.total_epochs = 5
        return config
    config.optimizer.freeze = (_FROZEN["image"],)
    config.optimizer.rules = _rules(text=0.2)
    config.methods.declip.objective.update(_MASKED_WORDS)
    config.train.update({"batch_size": 256, "total_epochs": 3})
    config.optimizer.warmup_epochs = 0.3
    if variant == "tuned":
        config.image.update({"cache": False, "frozen_statistics": True})
        config.methods.declip.data.features.views = 0
        config.objective.update(_CROPS)
        config.optimizer.freeze = ()
        config.optimizer.rules = _rules(image=0.1, text=0.2)
        config.optimizer.layer_decay = 0.9
        config.train.batch_size = 128
    return config
