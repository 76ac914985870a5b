"""Values that several configs share: towers, tokenizers, data and optimizers."""

from ml_collections import ConfigDict

# Towers small enough to train on a CPU or a small GPU with a few thousand pictures
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
# A SentencePiece model that every run trains on its own captions
OWN_PIECES = {"name": "sentencepiece", "vocab_size": 4096, "context": 24}

PAIRS = {"source": "webdataset", "path": "data/pairs/*.tar", "workers": 8}
COCO_RETRIEVAL = {"data": {"source": "webdataset", "path": "data/coco/val-*.tar"}}
FLICKR8K = {"source": "auto", "path": "data/flickr8k/train-*.tar"}
# Without a path, the run holds rows of its training data out
OWN_RETRIEVAL = {"data": {"source": "auto", "path": ""}}


def small(objective, towers=SMALL, *, augmentation="flip", crop_scale=(0.6, 1.0)):
    """A config of 15 epochs on Flickr8k at batch 128, which take minutes on two CPU cores. It
    evaluates on rows that it holds out, unless `evals.retrieval.data.path` names others."""
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
            "evals": {"retrieval": OWN_RETRIEVAL},
        }
    )


def compared(config, *, zero_shot=True):
    """`config` with what the comparisons share, changed in place.

    It trains on the Flickr8k in $FLICKR8K and evaluates once at the end: retrieval on Flickr8k, and
    linear probes and zero-shot classification on the pictures in $CIFAR10 and $TINY_IMAGENET.
    """

    def source(folder, name, **names):
        return {"source": "folder", "path": f"${folder}/{name}.tar", **names}

    names = {"names": "$TINY_IMAGENET/classnames.json"}
    sets = {
        "cifar10": (source("CIFAR10", "train"), source("CIFAR10", "test")),
        "tiny_imagenet": (
            source("TINY_IMAGENET", "train", **names),
            source("TINY_IMAGENET", "val", **names),
        ),
    }
    config.data.path = "$FLICKR8K/train-*.tar"
    config.evals.retrieval.data.path = "$FLICKR8K/test-*.tar"
    for name, (train, test) in sets.items():
        config.evals[name] = {"evaluator": "linear_probe", "data": test, "train_data": train}
        if zero_shot:
            config.evals[f"{name}_zero_shot"] = {"evaluator": "zero_shot", "data": test}
    config.train.update({"eval_every_steps": None, "save_every_steps": 1000, "best": ""})
    return config


def with_clusters(config):
    """`config`, which is `compared`, with the evals of ProtoCLIP's claims too: clusters of the same
    pictures, and the gap between the modalities."""
    for name in ("cifar10", "tiny_imagenet"):
        data = config.evals[name].data
        config.evals[f"{name}_clusters"] = {"evaluator": "clustering", "data": data}
    config.evals.modality_gap = {"data": config.evals.retrieval.data}
    return config


DECLIP = "DeCLIP, arXiv 2110.05208, abstract"
CLIP_LITE = "CLIP-Lite, arXiv 2112.07133, abstract"
PROTOCLIP = "ProtoCLIP, arXiv 2206.10996, abstract"
MORE_DATA = "millions of pairs, of which a run sees each a few times"
LITE_SCALE = "a pretrained BERT, COCO's 118,000 images and batch 1,024, as in the paper"


def claims(source, better, worse, would_tell="", **by_metric):
    """Entries of `CLAIMS`: that the variant `better` is better than `worse` by some metrics, each
    with the words of the claim. `__` in a metric's name stands for its slash."""
    return [
        {
            "claim": words,
            "source": source,
            "metric": name.replace("__", "/"),
            "better": better,
            "worse": worse,
            "would_tell": would_tell,
        }
        for name, words in by_metric.items()
    ]
