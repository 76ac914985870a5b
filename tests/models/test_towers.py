"""What towers declare about themselves is true, and every tower keeps the laws of rows."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.towers import variables

from clipx.config import binding
from clipx.models.bert import BERT
from clipx.models.convnext import ConvNeXt
from clipx.models.efficientnet import EfficientNet
from clipx.models.eva import EVA
from clipx.models.resnet import ResNet
from clipx.models.t5 import T5
from clipx.models.text import TextTransformer
from clipx.models.vit import ViT
from clipx.models.vitamin import ViTamin

SMALL = {"width": 16, "depth": 1, "heads": 2}
TOWERS = [
    ViT(variant="ViT-Ti/16", image_size=48, **SMALL),
    ViT(variant="ViT-Ti/16", image_size=48, pool="mean", embed_dim=0, **SMALL),
    ResNet(variant="RN50", image_size=64, width=4, blocks=(1, 1, 1)),
    ResNet(variant="resnet18", image_size=32, embed_dim=0, blocks=(1, 1)),
    EfficientNet(variant="efficientnet_lite2", image_size=32, width=0.1, depth=0.1),
    ViT(variant="ViT-Ti/16", image_size=50, uneven=True, pool="query", pool_width=24, **SMALL),
    ConvNeXt(variant="tiny", image_size=32, width=4, blocks=(1, 1, 1, 1), hidden=12),
    EVA(image_size=48, mlp_ratio=2.0, pool="class", pool_heads=2, **SMALL),
    EVA(
        image_size=48,
        mlp_ratio=2.0,
        gated=False,
        sub_norms=False,
        key_bias=True,
        pre_norm=True,
        pool="attention",
        pool_heads=4,
        **SMALL,
    ),
    ViTamin(variant="small", image_size=32, widths=(4, 8, 16), depth=1, heads=2),
    TextTransformer(vocab_size=40, context=9, eot_id=39, **SMALL),
    TextTransformer(vocab_size=40, context=9, eot_id=39, pool="class", **SMALL),
    TextTransformer(
        vocab_size=40, context=9, eot_id=39, pool="first", causal=False, mask_padding=True, **SMALL
    ),
    T5(vocab_size=40, context=9, head_width=4, mlp_width=24, dense_width=20, **SMALL),
    BERT(vocab_size=200, context=9, positions=12, embed_dim=0, **SMALL),
]
DECLARED = {
    *("from_tokenizer", "needs_start_mark", "backbone_width", "output_width"),
    *("position_table", "unseen_settings", "idle_ids"),
}
NEW = [t for t in TOWERS if isinstance(t, ConvNeXt | EVA | ViTamin | T5)]
NEW += [t for t in TOWERS if getattr(t, "pool", "") in ("query", "first", "class")]
NEW = [t for t in NEW if not (isinstance(t, ViT) and t.pool == "class")]


def example(tower, rows, seed=0):
    """A batch for the tower: pictures, or texts of several lengths."""
    rng = np.random.default_rng(seed)
    if "image_size" in binding.fields(type(tower)):
        side = tower.image_size
        return rng.normal(size=(rows, side, side, 3)).astype(np.float32)
    ids = rng.integers(4, 38, (rows, 9)).astype(np.int32)
    for i, row in enumerate(ids):
        end = 4 + i % 5
        row[end], row[end + 1 :] = tower.eot_id, tower.pad_id
    return ids


def named(tower):
    """A case of the laws. What takes long to compile is slow."""
    long = isinstance(tower, ConvNeXt | ViTamin) or tower.pool in ("query", "attention")
    slow = [pytest.mark.slow] if long else []
    return pytest.param(
        tower, id=f"{type(tower).__name__}-{getattr(tower, 'pool', '')}", marks=slow
    )


@pytest.mark.parametrize("tower", [named(t) for t in NEW])
def test_rows_and_slices(tower):
    """A row's features depend on that row alone, to the bit; every parameter has a gradient; and
    all is finite in bfloat16."""
    tower = tower.clone(dtype="float32", **({"dropout": 0.0} if hasattr(tower, "dropout") else {}))
    made, x = variables(tower, 0), example(tower, 6)
    other = np.concatenate([x[:3], example(tower, 6, seed=1)[3:4], x[4:]])

    def run(params, x, tower=tower):
        encoded = tower.apply({"params": params}, x)
        return jnp.sum(encoded.raw**3), (encoded.raw, encoded.backbone, encoded.tokens)

    both, params = jax.jit(jax.value_and_grad(run, has_aux=True)), made["params"]
    ((_, whole), gradient), ((_, changed), _) = both(params, x), both(params, other)
    part = jax.jit(run)(params, x[1:3])[1]
    for a, b, c in zip(whole, changed, part):
        assert np.any(a[3] != b[3]) and np.all(np.isfinite(a))
        np.testing.assert_array_equal(np.delete(a, 3, 0), np.delete(b, 3, 0))
        np.testing.assert_allclose(a[1:3], c, rtol=2e-5, atol=2e-5)
    for path, g in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.all(np.isfinite(g)) and np.any(g != 0), jax.tree_util.keystr(path)
    half = jax.jit(lambda params, x: run(params, x, tower.clone(dtype="bfloat16"))[1])
    large = half(params, 30 * x if x.ndim == 4 else x)
    assert all(np.all(np.isfinite(np.asarray(y, np.float32))) for y in large)


@pytest.mark.slow
@pytest.mark.parametrize("tower", [named(t) for t in NEW])
def test_features_do_not_depend_on_the_mesh(tower):
    """Rows over eight devices give what one device gives."""
    tower = tower.clone(dtype="float32", **({"dropout": 0.0} if hasattr(tower, "dropout") else {}))
    made, x = variables(tower, 0), example(tower, 8)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    one = jax.jit(tower.apply)(made, x).raw
    many = jax.jit(tower.apply)(made, jax.device_put(x, rows)).raw
    np.testing.assert_allclose(one, many, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tower", TOWERS, ids=lambda t: type(t).__name__)
def test_declarations(tower):
    """Declared widths are those of the output, and the position table is where it is declared."""
    encoded, made = jax.eval_shape(
        lambda key: tower.init_with_output(key, example(tower, 1)), jax.random.key(0)
    )
    assert tower.backbone_width == encoded.backbone.shape[1]
    assert tower.output_width == encoded.raw.shape[1]
    if tower.position_table is not None:
        path, first, shape = tower.position_table
        rows = made["params"]
        for name in path:
            rows = rows[name]
        assert rows.shape[0] == first + math.prod(shape)
    fields = binding.fields(type(tower))
    assert set(tower.from_tokenizer) <= set(fields)
    assert not DECLARED & set(fields)
    assert not any(name in repr(tower) for name in DECLARED)
