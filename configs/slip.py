"""SLIP (arXiv 2112.12750; constants from facebookresearch/SLIP): ViT-B/16, 25 epochs of OpenAI's
list of YFCC15M at batch 4,096. As DeCLIP's repository trains it, on its own list: `:declip`
(ViT-B/32) and `:declip_rn50`. `:small` for a CPU or a small GPU."""

from ml_collections import ConfigDict

from clipx.configs import common, declip

VARIANTS = ("", "declip", "declip_rn50", "small")
_PAIRS = 14_689_580  # of the list, those that were still to be had


def _declip(image, embed_dim):
    return declip.yfcc15m(
        {"name": "slip", "ssl_augmentation": "mocov2"},
        image,
        embed_dim=embed_dim,
        learning_rate=5e-4,
        weight_decay=0.5,
    )


def get_config(variant=""):
    if variant == "small":
        return common.small(
            {
                "name": "slip",
                "ssl_augmentation": declip.MOCOV2_64,
                "ssl_crop_scale": (0.2, 1.0),
                "head_width": 1024,
            }
        )
    if variant == "declip":
        return _declip(declip.VIT_B32, 512)
    if variant == "declip_rn50":
        return _declip(declip.RN50, 1024)
    return ConfigDict(
        {
            # what its numbers were trained with: gradients to features as queries alone
            "objective": {"name": "slip", "compat": {"detach_gather": True}},
            "image": {
                "name": "vit",
                "variant": "ViT-B/16",
                "pre_norm": False,
                "norm_eps": 1e-6,
            },
            "text": {"name": "text", "activation": "quick_gelu"},
            "tokenizer": common.CLIP_BPE,
            "data": {
                "source": "webdataset",
                "path": "data/yfcc15m_openai/*.tar",
                "manifest": "yfcc15m_openai",
                "workers": 8,
            },
            "train": {
                "batch_size": 4096,
                "total_examples": 25 * _PAIRS,
                "save_every_steps": 1000,
                "eval_every_steps": 3586,
                "best": "retrieval/mean_recall",
            },
            "optimizer": {
                "learning_rate": 3e-3,
                "warmup_from": 1e-6,
                "warmup_examples": _PAIRS,
                "final_learning_rate": 1e-5,
                "b2": 0.98,
                "eps": 1e-8,
                "weight_decay": 0.1,
                "rules": (declip.scale_rule(0.0, 4.6052), *declip.RULES[1:]),
            },
            "evals": {"retrieval": common.COCO_RETRIEVAL},
        }
    )
