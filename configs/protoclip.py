"""ProtoCLIP (arXiv 2206.10996; constants from megvii-research/protoclip): RN50 on 2.5 million pairs
of CC3M with 8 GPUs at batch 512, or `:1gpu` at batch 64; `:clip` and `:clip_1gpu` are CLIP with as
many steps and the same augmentation, `:clip_original` and `:clip_1gpu_original` the authors' CLIP,
whose crops are lighter; `:small` for a CPU or a small GPU, beside which configs/clip.py:small is
CLIP with the same pairs and augmentation.

An episode is of whole batches: 390 steps at batch 512, where the authors' schedule counts a 391st
that is never taken; 156,000 updates in either. With 8 GPUs the statistics of BatchNorm were those
of 64 rows: with `objective.groups=8` the heads' are; the image tower's are the whole batch's. The
teacher's file is written by `python -m clipx.teacher`.
"""

from ml_collections import ConfigDict

from clipx.configs import common

_CLIP = ("clip", "clip_1gpu", "clip_original", "clip_1gpu_original")
VARIANTS = ("", "1gpu", *_CLIP, "small")

_NO_DECAY = {"weight_decay": 0.0}
_SCALES = {"pattern": "(^|/)logit_scale$", **_NO_DECAY, "clamp": (0.0, 4.6051702)}
_HEADS = {"pattern": "^heads/", **_NO_DECAY}


def _rules(method, image_horizon):
    """No decay for gains, biases, scales and heads; the image tower's learning rate is 0 from
    `image_horizon` of the steps on."""
    heads = (_HEADS,) if method == "protoclip" else ()
    image = {"horizon": image_horizon}
    return (
        _SCALES,
        *heads,
        {"pattern": "^image/(.*/)?(bias|scale)$", **_NO_DECAY, **image},
        {"pattern": "^image/", **image},
        {"pattern": "(^|/)(bias|scale)$", **_NO_DECAY},
        {"pattern": ".*"},
    )


def _cc2m(objective, *, batch, steps, learning_rate, warmup, image_horizon=1.0):
    return ConfigDict(
        {
            "objective": objective,
            "image": {"name": "resnet", "variant": "RN50", "embed_dim": 1024},
            "text": {"name": "text", "activation": "quick_gelu", "embed_dim": 1024},
            "tokenizer": common.CLIP_BPE | {"cleaning": "ascii"},
            "data": {
                "source": "table",
                "path": "data/cc2.5m/train.csv",
                "image": "filepath",
                "captions": "title",
                "separator": "\t",
                "workers": 8,
            },
            "train": {
                "batch_size": batch,
                "total_steps": steps,
                "log_every_steps": 50,
                "save_every_steps": 1000,
                "eval_every_steps": 10_000,
                "best": "retrieval/mean_recall",
            },
            "optimizer": {
                "learning_rate": learning_rate,
                # the first update has 1 / warmup of it, the last of the warm-up and the next all
                "warmup_from": learning_rate / warmup,
                "warmup_steps": warmup - 1,
                "hold_steps": 1,
                "b2": 0.999,
                "eps": 1e-8,
                "weight_decay": 0.5,
                "clip_norm": 10.0,
                "rules": _rules(objective["name"], image_horizon),
            },
            "evals": {"retrieval": common.COCO_RETRIEVAL},
        }
    )


_EIGHT = {"batch": 512, "learning_rate": 5e-4, "warmup": 15_625}
_ONE = {"batch": 64, "learning_rate": 5e-5, "warmup": 2000}


def _protoclip(episodes, recipe):
    """The last two episodes are of the contrastive loss alone, the image tower standing still, as
    their --lit-start-epoch of `episodes` - 1 makes them."""
    objective = {
        "name": "protoclip",
        "external_weight": 1.0,
        "lit_start": episodes - 1,
        "compat": {"lit_start": True},
    }
    steps = episodes * (200_000 // recipe["batch"])
    config = _cc2m(objective, steps=steps, image_horizon=(episodes - 2) / episodes, **recipe)
    config.data.teacher = "data/cc2.5m/roberta-large.npy"
    return config


def _small():
    """15 episodes of an epoch of Flickr8k."""
    objective = {
        "name": "protoclip",
        "k": 200,
        "episode_size": 46 * 128,
        "with_replacement": False,
        "projection_dim": 64,
        "projection_hidden": 256,
    }
    config = common.small(objective)
    config.optimizer.rules = (
        _SCALES,
        _HEADS,
        {"pattern": "(^|/)(bias|scale|class_embedding)$", **_NO_DECAY},
        {"pattern": ".*"},
    )
    return config


def get_config(variant=""):
    if variant == "small":
        return _small()
    recipe, one = (_ONE, True) if "1gpu" in variant else (_EIGHT, False)
    if variant not in _CLIP:
        return _protoclip(100 if one else 400, recipe)
    if variant.endswith("original"):  # 8 or 32 epochs of 2.5 million
        objective = {"name": "clip"}
        steps = (8 if one else 32) * (2_500_000 // recipe["batch"])
    else:
        objective = {"name": "clip", "augmentation": "protoclip_light"}
        steps = 312_500 if one else 156_000
    return _cc2m(objective, steps=steps, **recipe)
