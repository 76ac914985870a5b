from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import load_oracle, tiny

from clipx.config.binding import bind
from clipx.errors import ConfigError
from clipx.models.text import TextTransformer

ORACLES = load_oracle("declip")
EOT = 9
TINY = dict(
    vocab_size=32, context=8, width=16, depth=1, heads=2, eot_id=EOT, embed_dim=8, dtype="float32"
)
IDS = np.array(
    [[1, 2, 3, EOT, 0, 0, 0, 0], [1, 4, EOT, 5, EOT, 0, 7, 0], [1, 0, 0, 6, 0, 0, 0, 0]], np.int32
)


@pytest.fixture(scope="module")
def params():
    """Random parameters, none all zeros or ones, made without compiling `init`."""
    random = np.random.default_rng(1)
    shapes = jax.eval_shape(TextTransformer(**TINY).init, jax.random.key(0), IDS)
    return jax.tree.map(lambda v: 0.3 * random.normal(size=v.shape).astype(v.dtype), shapes)


def S(shape, phase, scale=1.0):
    return (scale * np.sin(phase + 0.7 * np.arange(np.prod(shape)))).reshape(shape)


def oracle_params(entry, heads):
    """The oracle's torch-shaped parameters under this project's names and layouts."""
    torch = {name: S(shape, i, 0.3) for i, (name, shape) in enumerate(entry["param_order"])}
    width = torch["ln_final.weight"].size

    def norm(name):
        return {"scale": torch[name + ".weight"], "bias": torch[name + ".bias"]}

    def dense(name):
        return {"kernel": torch[name + ".weight"].T, "bias": torch[name + ".bias"]}

    def block(name):
        qkv = torch[name + "attn.in_proj_weight"].T.reshape(width, 3, heads, -1)
        out = dense(name + "attn.out_proj")
        out["kernel"] = out["kernel"].reshape(heads, -1, width)
        bias = torch[name + "attn.in_proj_bias"].reshape(3, heads, -1)
        return {
            "ln_1": norm(name + "ln_1"),
            "attn": {"qkv": {"kernel": qkv, "bias": bias}, "out": out},
            "ln_2": norm(name + "ln_2"),
            "mlp": {"fc": dense(name + "mlp.c_fc"), "proj": dense(name + "mlp.c_proj")},
        }

    return {
        "token_embedding": torch["token_embedding.weight"],
        "positional_embedding": torch["positional_embedding"],
        "transformer": {f"block_{i}": block(f"transformer.resblocks.{i}.") for i in range(2)},
        "ln_final": norm("ln_final"),
        "projection": dense("text_projection"),
    }


@pytest.mark.parametrize("dtype,tolerance", [("float64", 1e-9), ("float32", 1e-5)])
def test_equals_the_reference(dtype, tolerance):
    entry = ORACLES["text_tiny"]
    text = TextTransformer(
        vocab_size=49409,
        context=12,
        width=8,
        depth=2,
        heads=2,
        embed_dim=4,
        eot_id=49408,
        projection_bias=True,
        activation="quick_gelu",
        dtype=dtype,
    )
    with jax.enable_x64(dtype == "float64"):
        params = jax.tree.map(lambda v: jnp.asarray(v, dtype), oracle_params(entry, 2))
        out = jax.jit(text.apply)({"params": params}, jnp.asarray(entry["ids"], jnp.int32))
        for name, value in {"embed": out.raw, "tokens_after_ln_final": out.tokens}.items():
            assert value.dtype == dtype
            atol = tolerance * np.abs(entry[name]).max()
            np.testing.assert_allclose(value, entry[name], rtol=0, atol=atol, err_msg=name)


@functools.cache
def compiled(**options):
    return jax.jit(TextTransformer(**TINY, **options).apply, compiler_options=tiny.EXACT)


def encode(params, ids, **options):
    return compiled(**options)(params, ids)


def test_eot_pooling_takes_the_first_else_the_last(params):
    out = encode(params, IDS)
    tokens = np.asarray(out.tokens)
    for row, at in enumerate((3, 2, 7)):
        np.testing.assert_array_equal(out.backbone[row], tokens[row, at])
    np.testing.assert_array_equal(encode(params, IDS, pool="last").backbone, tokens[:, -1])
    mean = encode(params, IDS, pool="mean").backbone
    np.testing.assert_allclose(mean, tokens.mean(1), atol=1e-6)


def test_last_is_the_last_unmasked(params):
    out = encode(params, IDS, mask_padding=True, pool="last")
    tokens = np.asarray(out.tokens)
    np.testing.assert_array_equal(out.backbone, tokens[np.arange(3), [3, 2, 3]])


@pytest.mark.parametrize("causal", [True, False])
def test_masked_padding_is_not_seen(params, causal):
    options = dict(mask_padding=True, causal=causal, pool="mean")
    out = jax.tree.map(np.asarray, encode(params, IDS, **options))
    ends = (4, 3, 4)  # the third row: a 0 inside the text is no padding
    changed = IDS.copy()
    changed[0, 4:], changed[1, 3:] = 11, 12
    again = jax.tree.map(np.asarray, encode(params, changed, **options))
    for row, end in enumerate(ends):
        np.testing.assert_array_equal(out.backbone[row], again.backbone[row])
        np.testing.assert_allclose(out.backbone[row], out.tokens[row, :end].mean(0), atol=1e-6)
    short = encode(params, IDS[:, :4], **options)  # shorter than the context
    np.testing.assert_allclose(out.backbone, short.backbone, atol=1e-5)


@pytest.mark.slow  # `test_masked_padding_is_not_seen` pads with zeros
@pytest.mark.parametrize("causal", [True, False])
def test_the_end_mark_may_pad(params, causal):
    """A text ends at its first end mark, so end marks can pad it as zeros can. SigLIP's tower pools
    the last token, which attends to the padding."""
    zeros = IDS[:2] * (np.arange(8) < [[4], [3]])
    ends = np.where(np.arange(8) < [[4], [3]], IDS[:2], EOT)
    for pool in ("eot", "last", "mean"):
        options = dict(mask_padding=True, causal=causal, pool=pool)
        a = encode(params, zeros, **options).raw
        b = encode(params, ends, **options, pad_id=EOT).raw
        np.testing.assert_array_equal(a, b)
    last = encode(params, ends, causal=causal, pool="last", pad_id=EOT)
    np.testing.assert_array_equal(last.backbone, np.asarray(last.tokens)[:, -1])
    other = np.where(np.arange(8) == 6, 5, ends)
    assert np.all(encode(params, other, causal=causal, pool="last").raw != last.raw)


def test_causal_tokens_ignore_what_follows(params):
    changed = IDS.copy()
    changed[:, 5:] = 20
    for causal in (True, False):
        a, b = (encode(params, ids, causal=causal).tokens[:, :5] for ids in (IDS, changed))
        assert np.array_equal(a, b) == causal


def test_a_row_depends_on_its_text_and_key_alone(params):
    text = TextTransformer(**TINY, dropout=0.3)
    apply = jax.jit(lambda ids, keys: text.apply(params, ids, train=True, keys=keys))
    keys = jax.random.split(jax.random.key(3), 3)
    out = apply(IDS, keys)
    order = np.array([0, 2, 1])
    others = apply(IDS[order], keys[order])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[order], b), out, others)
    assert not np.allclose(apply(IDS, keys[::-1]).raw[0], out.raw[0])


def test_bfloat16_is_finite_and_near(params):
    exact = encode(params, IDS)
    text = TextTransformer(**{**TINY, "dtype": "bfloat16"})

    def loss(params):
        out = text.apply(params, jnp.asarray(IDS))
        return out.unit.sum(), out

    grad, out = jax.jit(jax.grad(loss, has_aux=True))(params)
    assert out.tokens.dtype == jnp.bfloat16 and out.unit.dtype == jnp.float32
    assert all(np.isfinite(g).all() and g.dtype == jnp.float32 for g in jax.tree.leaves(grad))
    np.testing.assert_allclose(out.unit, exact.unit, atol=0.1)


@pytest.mark.parametrize(
    "width,depth,heads,parameters",  # open_clip's, minus the visual tower and the logit scale
    [
        (512, 12, 8, 151_277_313 - 87_849_216 - 1),  # ViT-B-32
        (1024, 24, 16, 1_366_678_273 - 1_012_645_632 - 1),  # ViT-g-14
        (1280, 32, 20, 2_539_567_105 - 1_844_907_264 - 1),  # ViT-bigG-14
    ],
)
def test_published_sizes(width, depth, heads, parameters):
    text = TextTransformer(width=width, depth=depth, heads=heads, embed_dim=width, scan=True)
    shapes = jax.eval_shape(text.init, jax.random.key(0), jnp.zeros((1, 77), jnp.int32))
    assert sum(v.size for v in jax.tree.leaves(shapes)) == parameters


def test_initialisation_is_clips():
    text = TextTransformer(vocab_size=4000, depth=1, width=128, heads=2, eot_id=1)
    params = jax.jit(text.init)(jax.random.key(0), jnp.zeros((1, 77), jnp.int32))["params"]
    params = jax.tree.map(np.asarray, params)
    block = params["transformer"]["block_0"]
    expected = [
        (params["token_embedding"], 0.02),
        (params["positional_embedding"], 0.01),
        (block["attn"]["qkv"]["kernel"], 128**-0.5),
        (block["attn"]["out"]["kernel"], 256**-0.5),
        (block["mlp"]["fc"]["kernel"], 256**-0.5),
        (block["mlp"]["proj"]["kernel"], 256**-0.5),
        (params["projection"]["kernel"], 128**-0.5),
        (block["mlp"]["fc"]["bias"], (3 * 128) ** -0.5),
    ]
    for value, std in expected:
        np.testing.assert_allclose(value.std(), std, rtol=0.05 if value.size > 5000 else 0.2)
    assert not block["attn"]["qkv"]["bias"].any()


@pytest.mark.parametrize(
    "fields,where",
    [(dict(vocab_size=4096), "eot_id"), (dict(heads=7), "heads"), (dict(depth=0), "depth")],
)
def test_impossible_fields_are_config_errors(fields, where):
    with pytest.raises(ConfigError) as error:
        bind(TextTransformer, fields, where="TextTransformer")
    assert f"TextTransformer.{where}" in str(error.value)


def test_ids_and_lengths_outside_the_model_do_not_pass_silently(params):
    assert np.isnan(encode(params, np.full((1, 8), 32, np.int32)).raw).all()
    with pytest.raises(ValueError, match="TextTransformer.context=8, but"):
        encode(params, np.zeros((1, 9), np.int32))
