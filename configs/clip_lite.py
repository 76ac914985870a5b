"""CLIP-Lite (arXiv 2112.07133; constants from the authors' code): ResNet-50 and a pretrained BERT
on COCO at batch 1,024. Variants: `bert_<n>layers` from scratch, `percent_<p>` of the pictures,
`batch_<n>`, `rn18` to `rn152`; `small` for a CPU or a small GPU, and `small_resnet`, whose last
convolution `grounding` can look at."""

from ml_collections import ConfigDict

from clipx.configs import common

_BERT = {"bert_2layers": 2, "bert_4layers": 4, "bert_6layers": 6}
_PERCENT = {  # share of the pictures, steps, warm-up
    "percent_10": (0.10, 20_000, 1000),
    "percent_25": (0.25, 62_500, 2500),
    "percent_50": (0.50, 125_000, 5000),
    "percent_75": (0.75, 187_500, 7500),
}
_ABLATIONS = {  # batch, image tower
    "batch_64": (64, "resnet50"),
    "batch_128": (128, "resnet50"),
    "batch_256": (256, "resnet50"),
    "batch_512": (512, "resnet50"),
    "rn18": (512, "resnet18"),
    "rn101": (512, "resnet101"),
    "rn152": (512, "resnet152"),
}
VARIANTS = ("", *_BERT, *_PERCENT, *_ABLATIONS, "small", "small_resnet")

# CLIP's small towers without projections: the critic has its own
_SMALL = {name: tower | {"embed_dim": 0} for name, tower in common.SMALL.items()}
_SMALL_RESNET = {
    "name": "resnet",
    "variant": "resnet18",
    "blocks": (1, 1, 1),  # of 112 px, a last map of 7 x 7
    "width": 32,
    "image_size": 112,
    "embed_dim": 0,
    "dtype": "float32",
}
_BERT_BASE = "data/bert-base-uncased"


def get_config(variant=""):
    if variant == "small":
        return common.small({"name": "clip_lite", "width": 512}, _SMALL)
    if variant == "small_resnet":
        towers = _SMALL | {"image": _SMALL_RESNET}
        return common.small({"name": "clip_lite", "width": 512}, towers)
    config = ConfigDict(
        {
            "objective": {"name": "clip_lite"},
            "image": {"name": "resnet", "variant": "resnet50", "embed_dim": 0},
            "text": {
                "name": "bert",
                "embed_dim": 0,
                "init_from": f"{_BERT_BASE}/model.safetensors",
            },
            "tokenizer": {
                "name": "wordpiece",
                "path": f"{_BERT_BASE}/vocab.txt",
                "context": 30,
                "cleaning": "clip_lite",
            },
            "data": {
                "source": "webdataset",
                "path": "data/coco/train-*.tar",
                "manifest": "coco",
                "workers": 8,
            },
            "train": {
                "batch_size": 1024,
                "total_steps": 250_000,
                "save_every_steps": 5000,
                "eval_every_steps": 10_000,
                "best": "retrieval/mean_recall",
            },
            "optimizer": {
                "name": "sgd",
                "learning_rate": 0.2,
                "momentum": 0.9,
                "weight_decay": 1e-4,
                "decay": "coupled",
                "clip_norm": 10.0,
                "lookahead": {"k": 5, "alpha": 0.5},
                "warmup_steps": 10_000,
                # all of it decays, the scale too, and nothing is clamped
                "rules": ({"pattern": "^image/"}, {"pattern": ".*", "learning_rate": 0.005}),
            },
            "evals": {"retrieval": common.COCO_RETRIEVAL},
        }
    )
    if variant in _BERT:
        config.text = {"name": "bert", "embed_dim": 0, "depth": _BERT[variant]}
    elif variant in _PERCENT:
        config.data.fraction, config.train.total_steps, warmup = _PERCENT[variant]
        config.optimizer.warmup_steps = warmup
    elif variant in _ABLATIONS:
        config.train.batch_size, config.image.variant = _ABLATIONS[variant]
        config.train.total_steps = 200_000
        config.text = {"name": "bert", "embed_dim": 0, "depth": 2}
        config.objective.augmentation = "clip_lite_flip"
    return config
