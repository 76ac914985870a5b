"""FILIP as DeCLIP's repository trains it (arXiv 2111.07783; constants from its experiments):
ViT-B/32, or `:rn50`, on YFCC15M, padding among the tokens; `:small`, without it, for a CPU or a
small GPU. `objective.top_k=None` keeps all tokens, as its published runs may have done."""

from clipx.configs import declip

VARIANTS = ("", "rn50", "small")


def get_config(variant=""):
    if variant == "small":
        return declip.small({"name": "filip", "token_width": 128})
    image, embed_dim = (declip.RN50, 1024) if variant == "rn50" else (declip.VIT_B32, 768)
    config = declip.yfcc15m(
        {"name": "filip", "mask_padding": False},
        image,
        embed_dim=embed_dim,
        learning_rate=5e-4,
        weight_decay=0.5,
    )
    config.train.log_every_steps = 60
    return config
