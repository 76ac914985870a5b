"""The BERT tower against BERT in NumPy, which has Hugging Face's names and torch's layouts."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from clipx.config.binding import bind
from clipx.errors import ConfigError
from clipx.interop import rules
from clipx.interop.bert_layout import layout
from clipx.models.bert import BERT, relative_buckets

PAD, CLS, SEP = 0, 1, 2
SIZES = dict(vocab_size=16, context=8, positions=10, width=8, depth=2, heads=2, eot_id=SEP)
TINY = SIZES | dict(embed_dim=0, dtype="float32", dropout=0.0)
IDS = np.array(
    [[CLS, 5, 6, SEP, 0, 0, 0, 0], [CLS, 9, SEP, 0, 0, 0, 0, 0], [CLS, 4, 3, 8, 7, 6, 5, SEP]],
    np.int32,
)


def arrays(seed: int = 0) -> dict[str, np.ndarray]:
    """A checkpoint of the tiny tower, in which no array is all zeros or ones."""
    rng = np.random.default_rng(seed)
    c, m = 8, 32
    shapes = {
        "embeddings.word_embeddings.weight": (16, c),
        "embeddings.position_embeddings.weight": (10, c),
        "embeddings.token_type_embeddings.weight": (2, c),
    }
    linears = {"pooler.dense": (c, c)}
    norms = ["embeddings.LayerNorm"]
    for i in range(2):
        layer = f"encoder.layer.{i}"
        names = ("attention.self.query", "attention.self.key", "attention.self.value")
        linears |= {f"{layer}.{name}": (c, c) for name in (*names, "attention.output.dense")}
        linears |= {f"{layer}.intermediate.dense": (m, c), f"{layer}.output.dense": (c, m)}
        norms += [f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"]
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name in norms:
        shapes |= {f"{name}.weight": (c,), f"{name}.bias": (c,)}
    return {name: rng.normal(size=s).astype(np.float32) for name, s in shapes.items()}


def reference(a: dict[str, np.ndarray], ids: np.ndarray):
    """The last layer's states [n, c] of one text without padding, and its pooled row [c]."""

    def linear(x, name):
        return x @ a[f"{name}.weight"].T + a[f"{name}.bias"]

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12)
        return x * a[f"{name}.weight"] + a[f"{name}.bias"]

    a = {name: x.astype(np.float64) for name, x in a.items()}
    n = len(ids)
    x = a["embeddings.word_embeddings.weight"][ids]
    x = x + a["embeddings.position_embeddings.weight"][:n]
    x = norm(x + a["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
    for i in range(2):
        layer = f"encoder.layer.{i}"
        q, k, v = (
            linear(x, f"{layer}.attention.self.{name}").reshape(n, 2, 4)
            for name in ("query", "key", "value")
        )
        weights = np.exp(np.einsum("thd,shd->hts", q, k) / 2)
        weights /= weights.sum(-1, keepdims=True)
        y = np.einsum("hts,shd->thd", weights, v).reshape(n, 8)
        y = linear(y, f"{layer}.attention.output.dense")
        x = norm(x + y, f"{layer}.attention.output.LayerNorm")
        y = linear(x, f"{layer}.intermediate.dense")
        y = y * 0.5 * (1 + np.vectorize(math.erf)(y / math.sqrt(2)))
        x = norm(x + linear(y, f"{layer}.output.dense"), f"{layer}.output.LayerNorm")
    return x, np.tanh(linear(x[0], "pooler.dense"))


@pytest.fixture(scope="module")
def params():
    """The parameters of the checkpoint, as a run starts with them."""
    flat = {"/".join(("params", *path)): x.shape for path, x in shapes(**TINY).items()}
    return rules.read(layout(BERT(**TINY), "bert", "params"), arrays(), lambda: flat, "")["params"]


def shapes(**fields):
    """The shapes of a tower's parameters, by their paths."""
    tower = BERT(**fields)
    tree = jax.eval_shape(tower.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    return traverse_util.flatten_dict(tree)


@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-11), ("float32", 1e-5)])
def test_equals_the_reference_and_does_not_see_padding(params, dtype, tolerance):
    with jax.enable_x64(dtype == "float64"):
        bert = BERT(**TINY | {"dtype": dtype})
        params = jax.tree.map(lambda x: x.astype(dtype), params)
        out = jax.jit(bert.apply)({"params": params}, IDS)
        assert out.tokens.dtype == out.backbone.dtype == dtype
    for row, length in enumerate((4, 3, 8)):
        tokens, pooled = reference(arrays(), IDS[row, :length])
        np.testing.assert_allclose(out.tokens[row, :length], tokens, atol=5 * tolerance)
        np.testing.assert_allclose(out.backbone[row], pooled, atol=tolerance)


def test_padding_ends_where_the_text_does(params):
    """Everything after the end mark is padding. In a text without an end mark a `pad_id` counts as
    a token unless it is at the end."""
    apply = jax.jit(BERT(**TINY).apply)
    ids = IDS.copy()
    ids[0, 4:], ids[1, 3:] = 11, 12  # after the end mark
    a, b = (apply({"params": params}, x).backbone for x in (IDS, ids))
    np.testing.assert_array_equal(a, b)
    open_ended = np.array([[CLS, PAD, 5, 6, PAD, PAD, PAD, PAD]], np.int32)
    tokens, pooled = reference(arrays(), open_ended[0, :4])
    out = apply({"params": params}, np.repeat(open_ended, 3, axis=0))
    np.testing.assert_allclose(out.backbone[0], pooled, atol=1e-5)


def test_dropout_comes_from_each_rows_key_alone(params):
    bert = BERT(**TINY | {"dropout": 0.3})
    apply = jax.jit(lambda ids, keys: bert.apply({"params": params}, ids, train=True, keys=keys))
    keys = jax.random.split(jax.random.key(3), 3)
    out = apply(IDS, keys)
    order = np.array([2, 0, 1])
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(np.asarray(a)[order], b),
        out,
        apply(IDS[order], keys[order]),
    )
    assert not np.allclose(apply(IDS, keys[::-1]).backbone[0], out.backbone[0], atol=1e-3)
    plain = bert.apply({"params": params}, IDS).backbone
    assert not np.allclose(plain, out.backbone, atol=1e-3)
    with pytest.raises(ValueError, match="needs `keys`"):
        bert.apply({"params": params}, IDS, train=True)


def test_bfloat16_is_finite_and_near(params):
    def loss(params, dtype):
        out = BERT(**TINY | {"dtype": dtype}).apply({"params": params}, IDS)
        return out.unit.sum(), out

    grads, out = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)(params, "bfloat16")
    assert out.backbone.dtype == jnp.bfloat16 and out.unit.dtype == jnp.float32
    assert all(np.isfinite(g).all() and g.dtype == jnp.float32 for g in jax.tree.leaves(grads))
    np.testing.assert_allclose(out.unit, loss(params, "float32")[1].unit, atol=0.1)


@pytest.mark.parametrize(
    "depth, count", [(2, 38_603_520), (4, 52_779_264), (6, 66_955_008), (12, 109_482_240)]
)
def test_published_size(depth, count):
    bert = BERT(depth=depth, embed_dim=0)
    shapes = jax.eval_shape(bert.init, jax.random.key(0), jnp.zeros((1, 30), jnp.int32))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == count


def test_initialisation_is_berts():
    bert = BERT(**TINY | dict(vocab_size=500, width=64, depth=1))
    params = jax.tree.map(np.asarray, jax.jit(bert.init)(jax.random.key(0), IDS)["params"])
    assert not params["token_embedding"][PAD].any() and params["token_embedding"][1:].all()
    for path, x in jax.tree.leaves_with_path(params):
        kind = path[-1].key
        if kind in ("scale", "bias"):
            np.testing.assert_array_equal(x, kind == "scale")
        else:
            np.testing.assert_allclose(x.std(), 0.02, rtol=0.25)


@functools.cache
def _apply(**fields):
    return jax.jit(BERT(**TINY | {"depth": 1} | fields).apply)


def pooled(params, **fields):
    """(`backbone`, tokens) of the three texts, with the first block alone."""
    out = _apply(**fields)({"params": params}, IDS)
    return np.asarray(out.backbone), np.asarray(out.tokens)


def test_pools(params):
    rest = {name: x for name, x in params.items() if name != "pooler"}
    lengths = (4, 3, 8)
    for pool, function in {
        "cls": lambda x: x[0],
        "mean": lambda x: x.mean(axis=0),
        "max": lambda x: x.max(axis=0),
    }.items():
        backbone, tokens = pooled(rest, pool=pool)
        for row, length in enumerate(lengths):
            np.testing.assert_allclose(backbone[row], function(tokens[row, :length]), atol=1e-5)


def test_a_dense_layer_and_normalisation_follow_the_pooling(params):
    """In the order of sentence-transformers' modules."""
    rng = np.random.default_rng(5)
    kernel, bias = rng.normal(size=(8, 6)).astype(np.float32), np.ones(6, np.float32)
    rest = {name: x for name, x in params.items() if name != "pooler"}
    mean, _ = pooled(rest, pool="mean")
    more = rest | {"dense": {"kernel": kernel, "bias": bias}}
    tanh, _ = pooled(more, pool="mean", dense_width=6)
    np.testing.assert_allclose(tanh, np.tanh(mean @ kernel + bias), atol=1e-5)
    fields = {"dense_width": 6, "dense_activation": "identity", "normalize": True}
    unit, _ = pooled(more, pool="mean", **fields)
    expected = mean @ kernel + bias
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(unit, expected, atol=1e-5)
    assert BERT(**TINY | fields).backbone_width == 6


def test_a_spelled_end_mark_ends_no_text(params):
    """Attention masks padding alone, as transformers does it."""
    apply = jax.jit(BERT(**TINY).apply)
    spelled = np.array([[CLS, 5, SEP, 6, SEP, PAD, PAD, PAD]] * 3, np.int32)
    _, expected = reference(arrays(), spelled[0, :5])
    np.testing.assert_allclose(apply({"params": params}, spelled).backbone[0], expected, atol=1e-5)


def test_a_bias_by_distance(params):
    """A table of zeros changes nothing; a huge bias leaves each token the one behind it."""
    fields, table = {"pool": "mean", "relative_buckets": 32}, np.zeros((32, 2), np.float32)
    mean, _ = pooled(params, pool="mean")
    zeros, _ = pooled(params | {"relative_bias": table}, **fields)
    np.testing.assert_allclose(zeros, mean, atol=1e-6)
    table[17] = 1e4  # the bucket of the next token
    next_, _ = pooled(params | {"relative_bias": table}, **fields)
    assert abs(next_ - mean).max() > 0.01


def test_buckets_are_mpnets():
    """Rows of T5's scheme: exact up to 7 tokens, then ranges, the last from 91 tokens on."""
    row = relative_buckets(200, 32)[0]
    assert row[:9].tolist() == [0, 17, 18, 19, 20, 21, 22, 23, 24]
    assert (row[128:] == 31).all() and (np.diff(row[1:]) >= 0).all()
    column = relative_buckets(200, 32)[:, 0]
    np.testing.assert_array_equal(column[1:], row[1:] - 16)


@pytest.mark.parametrize(
    "fields, where",
    [
        (dict(heads=3), "heads"),
        (dict(positions=7), "positions"),
        (dict(dropout=1.0), "dropout"),
        (dict(relative_buckets=6), "relative_buckets"),
    ],
)
def test_impossible_fields_are_config_errors(fields, where):
    with pytest.raises(ConfigError) as error:
        bind(BERT, TINY | fields, where="BERT")
    assert error.value.where == f"BERT.{where}"
