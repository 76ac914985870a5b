"""What the configs share: towers, tokenizers, data and optimizers, as values."""

from ml_collections import ConfigDict

# Towers of a size that a CPU or a small GPU trains on a few thousand pictures.
SMALL = {
    "image": {
        "name": "vit",
        "variant": "ViT-Ti/16",
        "image_size": 64,
        "width": 128,
        "depth": 4,
        "heads": 4,
        "embed_dim": 128,
        "dtype": "float32",
    },
    "text": {
        "name": "text",
        "width": 128,
        "depth": 3,
        "heads": 4,
        "embed_dim": 128,
        "dtype": "float32",
    },
}
MEDIUM = {
    "image": SMALL["image"] | {"width": 192, "depth": 6, "heads": 6, "embed_dim": 192},
    "text": SMALL["text"] | {"width": 192, "depth": 4, "heads": 6, "embed_dim": 192},
}

CLIP_BPE = {"name": "clip_bpe", "vocab_size": 49408, "context": 77}
# Trained on the run's own captions when it starts.
OWN_PIECES = {"name": "sentencepiece", "vocab_size": 4096, "context": 24}

PAIRS = {"source": "webdataset", "path": "data/pairs/*.tar", "workers": 8}
COCO_RETRIEVAL = {"data": {"source": "webdataset", "path": "data/coco/val-*.tar"}}
FLICKR8K = {"source": "webdataset", "path": "data/flickr8k/train-*.tar"}
FLICKR8K_RETRIEVAL = {"data": {"source": "webdataset", "path": "data/flickr8k/test-*.tar"}}


def small(objective, towers=SMALL, *, augmentation="flip", crop_scale=(0.6, 1.0)):
    """15 epochs of Flickr8k at batch 128: minutes on two CPU cores."""
    return ConfigDict(
        {
            "objective": {**objective, "augmentation": augmentation, "crop_scale": crop_scale},
            **towers,
            "tokenizer": OWN_PIECES,
            "data": FLICKR8K,
            "train": {
                "batch_size": 128,
                "total_epochs": 15,
                "log_every_steps": 10,
                "save_every_steps": 200,
                "eval_every_steps": 230,
                "best": "retrieval/mean_recall",
            },
            "optimizer": {
                "learning_rate": 1e-3,
                "weight_decay": 0.1,
                "warmup_epochs": 1.5,
                "clip_norm": 1.0,
            },
            "evals": {"retrieval": FLICKR8K_RETRIEVAL},
        }
    )
