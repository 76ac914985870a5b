"""FILIP (arXiv 2111.07783) as DeCLIP's repository trains it (constants from its experiments):
ViT-B/32, or `:rn50`, on YFCC15M, with padding among the tokens of a text. `:small` is for a CPU or
a small GPU. `objective.top_k=None` keeps all tokens, as the repository's published runs may have
done."""

from clipx.configs import common, declip

VARIANTS = ("", "rn50", "small")


def _small():
    """Like the variant `small` of configs/clip.py. All tokens of clean captions count, and a word
    sees its whole caption: read from left to right, most captions begin alike."""
    objective = {
        "name": "filip",
        "token_width": 128,
        "top_k": None,
        "contrast_clean_caption": True,
        # means over tokens differ less than cosines of rows, and a short run moves a scale little
        "logit_scale_init": 3.9,
        "evaluation": "query_tokens",
    }
    config = common.small(objective)
    config.text = {**common.SMALL["text"], "causal": False, "mask_padding": True}
    config.tokenizer = {**common.OWN_PIECES, **declip.MASK}  # for contrast_clean_caption=False
    return config


def get_config(variant=""):
    if variant == "small":
        return _small()
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
