"""Small models with random weights and a vocabulary, for tests of exports."""

import jax
import numpy as np

from clipx.interop import model as models

VIT = {"variant": "ViT-Ti/16", "image_size": 32, "width": 32, "depth": 2, "heads": 2}
RESNET = {"variant": "RN50", "image_size": 64, "width": 4, "blocks": (1, 2, 1, 1)}
TEXT = {"width": 32, "depth": 2, "heads": 2, "context": 16}
BOTH = {"embed_dim": 24, "dtype": "float32"}


def variables(tower, seed):
    """Random variables of a tower in its own layout, none of them 0 or 1."""
    rng = np.random.default_rng(seed)

    def leaf(path, x):
        if path[-1].key in ("scale", "var"):
            return rng.uniform(0.8, 1.2, x.shape).astype(np.float32)
        fan_in = x.size // x.shape[-1] if len(x.shape) > 1 else 9
        return (rng.normal(size=x.shape) * fan_in**-0.5).astype(np.float32)

    return jax.tree_util.tree_map_with_path(leaf, models.shapes(tower))


def model(image, text, words, bias=None, scale=2.5):
    parts = {"image": variables(image, 0), "text": variables(text, 1)}
    kinds = {
        kind: {n: v[kind] for n, v in parts.items() if kind in v}
        for kind in ("params", "batch_stats")
    }
    return models.make_model(
        image,
        text,
        kinds,
        logit_scale=np.float32(scale),
        logit_bias=None if bias is None else np.float32(bias),
        mean=(0.4, 0.5, 0.45),
        std=(0.2, 0.3, 0.25),
        words=words,
    )


def words_of(config, plain=True):
    ids = {k: getattr(config, k) for k in ("pad_id", "sot_id", "eot_id", "mask_id")}
    return models.Words(config.name, config.vocab_size, config.context, **ids, plain=plain)


def few_words(size=40, plain=True):
    """A small vocabulary and the text tower's fields for it, for tests without a tokenizer."""
    words = models.Words("clip_bpe", size, 16, 0, size - 2, size - 1, size - 3, plain)
    return words, TEXT | {"vocab_size": size, "eot_id": size - 1}
