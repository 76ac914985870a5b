"""Tiny runs of CLIP, DeCLIP and ProtoCLIP on shards of real files, for the harness.

$CHAOS_DATA is the folder of the shards.
"""

from ml_collections import ConfigDict

VARIANTS = ("clip", "declip", "protoclip")
STEPS, SAVE, EVAL, EPISODE, BATCH = 8, 3, 4, 2, 16
_TOWER = {"width": 16, "depth": 1, "heads": 2, "embed_dim": 8, "dtype": "float32"}
_OBJECTIVES = {
    "clip": {},
    "declip": {"simsiam_width": 12, "queue_size": 48, "augmentation": "flip"},
    "protoclip": {
        "k": 4,
        "episode_size": EPISODE * BATCH,
        "projection_dim": 6,
        "projection_hidden": 8,
        "iterations": 3,
        "restarts": 2,
    },
}


def get_config(variant="clip"):
    data = {"source": "webdataset", "path": "$CHAOS_DATA/*.tar"}
    words = {"text_augment": {"operations": ("swap", "delete")}}  # need no WordNet
    return ConfigDict(
        {
            "objective": {"name": variant, **_OBJECTIVES[variant]},
            "image": {"name": "vit", "image_size": 16, "patch": 8, **_TOWER},
            "text": {"name": "text", "dropout": 0.1, **_TOWER},
            "tokenizer": {
                "name": "sentencepiece",
                "vocab_size": 64,
                "context": 12,
                "mask": variant == "declip",
            },
            "data": {**data, **(words if variant == "declip" else {}), "max_bad_fraction": 0.01},
            "train": {
                "batch_size": BATCH,
                "total_steps": STEPS,
                "log_every_steps": 1,
                "save_every_steps": SAVE,
                "eval_every_steps": EVAL,
                "best": "",
            },
            "optimizer": {"learning_rate": 0.01, "warmup_steps": 2},
            "evals": {"retrieval": {"data": data, "limit": 16}},
        }
    )
