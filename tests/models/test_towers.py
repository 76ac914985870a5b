"""What towers declare about themselves is true."""

import math

import jax
import jax.numpy as jnp
import pytest

from clipx.config import binding
from clipx.models.bert import BERT
from clipx.models.efficientnet import EfficientNet
from clipx.models.resnet import ResNet
from clipx.models.text import TextTransformer
from clipx.models.vit import ViT

SMALL = {"width": 16, "depth": 1, "heads": 2}
TOWERS = [
    ViT(variant="ViT-Ti/16", image_size=48, **SMALL),
    ViT(variant="ViT-Ti/16", image_size=48, pool="mean", embed_dim=0, **SMALL),
    ResNet(variant="RN50", image_size=64, width=4, blocks=(1, 1, 1)),
    ResNet(variant="resnet18", image_size=32, embed_dim=0, blocks=(1, 1)),
    EfficientNet(variant="efficientnet_lite2", image_size=32, width=0.1, depth=0.1),
    TextTransformer(vocab_size=40, context=9, eot_id=39, **SMALL),
    BERT(vocab_size=200, context=9, positions=12, embed_dim=0, **SMALL),
]
DECLARED = {
    *("from_tokenizer", "needs_start_mark", "backbone_width", "output_width"),
    *("position_table", "unseen_settings"),
}


@pytest.mark.parametrize("tower", TOWERS, ids=lambda t: type(t).__name__)
def test_declarations(tower):
    """Declared widths are those of the output, and the position table is where it is declared."""
    example = jnp.zeros((1, 9), jnp.int32)
    if "image_size" in binding.fields(type(tower)):
        example = jnp.zeros((1, tower.image_size, tower.image_size, 3))
    encoded, variables = jax.eval_shape(
        lambda key: tower.init_with_output(key, example), jax.random.key(0)
    )
    assert tower.backbone_width == encoded.backbone.shape[1]
    assert tower.output_width == encoded.raw.shape[1]
    if tower.position_table is not None:
        path, first, shape = tower.position_table
        rows = variables["params"]
        for name in path:
            rows = rows[name]
        assert rows.shape[0] == first + math.prod(shape)
    fields = binding.fields(type(tower))
    assert set(tower.from_tokenizer) <= set(fields)
    assert not DECLARED & set(fields)
    assert not any(name in repr(tower) for name in DECLARED)
