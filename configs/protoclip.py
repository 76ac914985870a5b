"""ProtoCLIP (arXiv 2206.10996; constants from megvii-research/protoclip): RN50 on 2.5 million pairs
of CC3M, at batch 512 as on 8 GPUs, or `:1gpu` at batch 64. `:clip` and `:clip_1gpu` are CLIP with
the same steps and augmentation. `:clip_original` and `:clip_1gpu_original` are the authors' CLIP,
with lighter crops. `:small` is for a CPU or a small GPU; configs/clip.py:small is CLIP with the
same pairs and augmentation.

An episode has only full batches: 390 steps at batch 512. The authors' schedule counts a 391st step
that is never taken, so both make 156,000 updates. On 8 GPUs the statistics of BatchNorm are those
of 64 rows. With `objective.groups=8` this holds for the heads, but the image tower uses the
statistics of the full batch. `python -m clipx.teacher` writes the file of the teacher.
"""

from ml_collections import ConfigDict

from clipx.configs import common

_CLIP = ("clip", "clip_1gpu", "clip_original", "clip_1gpu_original")
VARIANTS = ("", "1gpu", *_CLIP, "small")

_NO_DECAY = {"weight_decay": 0.0}
_SCALES = {"pattern": "(^|/)logit_scale$", **_NO_DECAY, "clamp": (0.0, 4.6051702)}
_HEADS = {"pattern": "^heads/", **_NO_DECAY}


def _rules(method, image_horizon):
    """Rules without weight decay for gains, biases, scales and heads, and with a learning rate of 0
    for the image tower after the share `image_horizon` of the steps."""
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
                # update i of the warm-up has i / warmup of the learning rate; the first update
                # after it has the full rate too
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
    """The last two episodes use only the contrastive loss and freeze the image tower, as the
    authors' flag --lit-start-epoch of `episodes` - 1 does."""
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
    """15 episodes of one epoch of Flickr8k each."""
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
    if variant.endswith("original"):  # 8 or 32 epochs of 2.5 million pairs
        objective = {"name": "clip"}
        steps = (8 if one else 32) * (2_500_000 // recipe["batch"])
    else:
        objective = {"name": "clip", "augmentation": "protoclip_light"}
        steps = 312_500 if one else 156_000
    return _cc2m(objective, steps=steps, **recipe)
