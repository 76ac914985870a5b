"""DeFILIP: DeCLIP plus FILIP's loss on all tokens of the first view and the first text, with weight
0.2 (constants from Sense-GVT/DeCLIP's experiments). ViT-B/32 on YFCC15M; `:small` is for a CPU or a
small GPU. The weights of the losses sum to 1.2, as published."""

from clipx.configs import declip

VARIANTS = ("", "small")


def get_config(variant=""):
    if variant == "small":
        return declip.small(declip.SMALL | {"late_interaction_weight": 0.2, "token_width": 128})
    config = declip.yfcc15m(
        {"name": "declip", "late_interaction_weight": 0.2, "mask_padding": False}
    )
    config.train.save_every_steps = 200
    return config
