"""DeCLIP (arXiv 2110.05208; constants from Sense-GVT/DeCLIP's experiments): ViT-B/32, or `:rn50`,
on DeCLIP's list of YFCC15M at batch 4,096. `:88m` and `:88m_rn50` are for DeCLIP's list of 88
million pairs, which was never released. `:small` is for a CPU or a small GPU.

The learning rate warms up over the first 2,500 steps. It would reach 0 at step 128,001, which is
not part of the run. With `objective.groups=32` each group of 128 rows has its own queue (128 MiB)
and head statistics, as on the 32 GPUs of the published runs. Augmenting captions needs WordNet; a
run without it stops with an error that says where to get it.
"""

from ml_collections import ConfigDict

from clipx.configs import common

VARIANTS = ("", "rn50", "88m", "88m_rn50", "small")

MASK = {"mask": True}  # an id for masked words, which shifts the ids of the marks by one
YFCC15M = {  # DeCLIP's list; configs/slip.py uses OpenAI's list of the same name
    "source": "webdataset",
    "path": "data/yfcc15m_declip/*.tar",
    "manifest": "yfcc15m_declip",
    "caption": "first",
    "reject_cjk": True,
    "workers": 8,
}
VIT_B32 = {
    "name": "vit",
    "variant": "ViT-B/32",
    "activation": "quick_gelu",
    "block_init": "clip",
    "freeze_patches": True,
}
RN50 = {"name": "resnet", "variant": "RN50"}
# the patch embedding, if it is frozen
FROZEN = {"pattern": "^image/patch_embedding/", "learning_rate": 0.0, "weight_decay": 0.0}
# gains, scales and biases do not decay, except for the bias of qkv (torch's in_proj_bias, which is
# not the bias of a layer)
RULES = (
    {"pattern": "(^|/)attn/qkv/bias$"},
    {"pattern": "(^|/)(bias|scale)$", "weight_decay": 0.0},
    {"pattern": ".*"},
)


def scale_rule(least=3.0, most=6.0, learning_rate=1.0):
    """A rule that clamps the logarithm of the logit scale to [least, most]."""
    return {
        "pattern": "(^|/)logit_scale$",
        "learning_rate": learning_rate,
        "weight_decay": 0.0,
        "clamp": (least, most),
    }


def yfcc15m(objective, image=VIT_B32, *, embed_dim=512, learning_rate=1e-3, weight_decay=0.1):
    """The config that the recipes of DeCLIP's repository for YFCC15M share."""
    frozen = (FROZEN,) if image.get("freeze_patches") else ()
    return ConfigDict(
        {
            "objective": objective,
            "image": image | {"embed_dim": embed_dim},
            "text": {
                "name": "text",
                "activation": "quick_gelu",
                "projection_bias": True,
                "embed_dim": embed_dim,
            },
            "tokenizer": {"name": "clip_bpe", "vocab_size": 49409, "context": 77, **MASK},
            "data": YFCC15M,
            "train": {
                "batch_size": 4096,
                "total_steps": 128_000,
                "log_every_steps": 100,
                "save_every_steps": 500,
                "eval_every_steps": 2000,
                "best": "retrieval/mean_recall",
            },
            "optimizer": {
                "learning_rate": learning_rate,
                "warmup_from": 1e-4,
                "warmup_steps": 2499,
                "b2": 0.98,
                "eps": 1e-8,
                "weight_decay": weight_decay,
                "rules": (*frozen, scale_rule(), *RULES),
            },
            "evals": {"retrieval": common.COCO_RETRIEVAL},
        }
    )


# The augmentation "mocov2" for pictures of 64 instead of 224 pixels: less blur, larger crops
MOCOV2_64 = {
    "scale": (0.4, 1.0),
    "flip": True,
    "jitter": 0.8,
    "brightness": 0.4,
    "contrast": 0.4,
    "saturation": 0.4,
    "hue": 0.1,
    "grey": 0.2,
    "blur": 0.5,
    "blur_sigma": (0.1, 0.6),
}


def small(objective):
    """Like the variant `small` of configs/clip.py, with captions augmented without WordNet.

    It has CLIP's crops, with which DeCLIP learns more from 6,000 pairs than with `MOCOV2_64`
    (docs/results.md).
    """
    config = common.small(objective)
    config.tokenizer.update(MASK)
    config.data.text_augment = {"operations": ("swap", "delete")}
    return config


SMALL = {"name": "declip", "queue_size": 1024, "simsiam_width": 512}


def get_config(variant=""):
    if variant == "small":
        return small(SMALL)
    rn50 = variant.endswith("rn50")
    config = yfcc15m({"name": "declip"}, *([RN50] if rn50 else []), embed_dim=1024 if rn50 else 512)
    config.train.save_every_steps = 200
    if not variant.startswith("88m"):
        return config
    config.data.update({"path": "data/declip88m/*.tar", "manifest": None})
    # SGD with weight decay in the gradient; the bound e^80 is never reached
    scale = scale_rule(most=80.0, learning_rate=0.1 if rn50 else 0.0)
    config.optimizer = {
        "name": "sgd",
        "learning_rate": 0.2,
        "warmup_from": 1e-3,
        "warmup_steps": 2499,
        "momentum": 0.9,
        "nesterov": True,
        "weight_decay": 1e-4,
        "decay": "coupled",
        "rules": (scale, *RULES),
    }
    config.train.total_steps = 46_000
    if not rn50:
        config.objective.contrastive_weight = 0.6
        config.image.embed_dim = config.text.embed_dim = 3072
        config.optimizer.update({"warmup_steps": 4999, "weight_decay": 0.0})
        config.optimizer.rules = (FROZEN, *config.optimizer.rules)
        config.train.update({"batch_size": 2048, "total_steps": 300_000, "log_every_steps": 50})
    return config
