"""CLIP (arXiv 2103.00020, tables 18 to 20): ViT-B/32, or `:rn50`; `:small` and `:medium` for a CPU
or a small GPU."""

from ml_collections import ConfigDict

from clipx.configs import common

VARIANTS = ("", "rn50", "small", "medium")


def get_config(variant=""):
    if variant == "small":
        return common.small({"name": "clip"})
    if variant == "medium":
        return common.small({"name": "clip"}, common.MEDIUM)
    config = ConfigDict(
        {
            "objective": {"name": "clip"},
            "image": {"name": "vit", "variant": "ViT-B/32", "activation": "quick_gelu"},
            "text": {"name": "text", "activation": "quick_gelu"},
            "tokenizer": common.CLIP_BPE,
            "data": common.PAIRS,
            "train": {
                "batch_size": 32768,
                "total_examples": 12_800_000_000,
                "save_every_steps": 1000,
                "eval_every_steps": 5000,
                "best": "retrieval/mean_recall",
            },
            "optimizer": {
                "learning_rate": 5e-4,
                "b2": 0.98,
                "eps": 1e-6,
                "weight_decay": 0.2,
                "warmup_steps": 2000,
            },
            "evals": {"retrieval": common.COCO_RETRIEVAL},
        }
    )
    if variant == "rn50":
        config.image = {"name": "resnet", "variant": "RN50", "embed_dim": 1024}
        config.text.embed_dim = 1024
        config.optimizer.update({"b2": 0.999, "eps": 1e-8})
    return config
