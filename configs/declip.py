"""DeCLIP (arXiv 2110.05208; constants from Sense-GVT/DeCLIP's experiments): ViT-B/32, or `:rn50`,
on its list of YFCC15M at batch 4,096; `:88m` and `:88m_rn50` on its list of 88 million pairs, which
was never released; `:small` for a CPU or a small GPU.

The learning rate rises from the first step's to the 2,500th's and is 0 at the 128,001st, which is
left out. `objective.groups=32` gives each 128 rows a queue (128 MiB) and head statistics of their
own, as those runs' 32 GPUs had. Captions are augmented with WordNet; without it a run says so.
"""

from ml_collections import ConfigDict

from clipx.configs import common

VARIANTS = ("", "rn50", "88m", "88m_rn50", "small")

MASK = {"mask": True}  # an id for hidden words: the tokenizer's marks move up by one
YFCC15M = {  # not OpenAI's list of that name, which is configs/slip.py's
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
# the patch embedding, where it is frozen; then all decays but gains, scales and layers' own biases,
# of which torch's qkv bias is none
FROZEN = {"pattern": "^image/patch_embedding/", "learning_rate": 0.0, "weight_decay": 0.0}
RULES = (
    {"pattern": "(^|/)attn/qkv/bias$"},
    {"pattern": "(^|/)(bias|scale)$", "weight_decay": 0.0},
    {"pattern": ".*"},
)


def scale_rule(least=3.0, most=6.0, learning_rate=1.0):
    """The logarithm of a logit scale stays within bounds."""
    return {
        "pattern": "(^|/)logit_scale$",
        "learning_rate": learning_rate,
        "weight_decay": 0.0,
        "clamp": (least, most),
    }


def yfcc15m(objective, image=VIT_B32, *, embed_dim=512, learning_rate=1e-3, weight_decay=0.1):
    """What the recipes of that repository on YFCC15M share."""
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


# Photometry of "mocov2" for pictures of 64 pixels rather than 224: less blur, larger crops.
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
    """As configs/clip.py's; captions are augmented without WordNet."""
    config = common.small(objective, augmentation=MOCOV2_64, crop_scale=None)
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
    # momentum whose decay is in the gradient; e^80 is no bound
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
