"""DeFILIP: DeCLIP with FILIP's loss, of all tokens, between the first view and the first text, at
0.2 (constants from Sense-GVT/DeCLIP's experiments): ViT-B/32 on YFCC15M; `:small` for a CPU or a
small GPU. The weights sum to 1.2, as published."""

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
