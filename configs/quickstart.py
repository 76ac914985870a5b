"""CLIP on drawn shapes: two minutes on two CPU cores, nothing to download."""

from ml_collections import ConfigDict

from clipx.configs import common

VARIANTS = ("",)


def get_config(variant=""):
    return ConfigDict(
        {
            "objective": {"name": "clip", "crop_scale": (0.9, 1.0)},
            "image": common.SMALL["image"]
            | {"image_size": 32, "patch": 8, "depth": 3, "pool": "mean"},
            "text": common.SMALL["text"] | {"depth": 2},
            "tokenizer": {
                "name": "sentencepiece",
                "vocab_size": 256,
                "context": 20,
                "sample": 4000,
            },
            "data": {"source": "shapes", "image_size": 32},
            "train": {
                "batch_size": 128,
                "total_steps": 480,
                "log_every_steps": 10,
                "save_every_steps": 100,
                "best": "zero_shot/top1",
            },
            "optimizer": {
                "learning_rate": 1e-3,
                "weight_decay": 0.1,
                "warmup_steps": 50,
                "clip_norm": 1.0,
            },
            "evals": {
                "zero_shot": {
                    "data": {"source": "shapes", "split": "test", "image_size": 32},
                    "templates": ("a {}", "a picture of a {}"),
                },
            },
        }
    )
