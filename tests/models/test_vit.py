from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import load_oracle

from clipx.config.binding import bind
from clipx.errors import ConfigError
from clipx.models.layers import drop, dropout_keys, unit
from clipx.models.transformer import stack_blocks, unstack_blocks
from clipx.models.vit import ViT

ORACLES = load_oracle("declip")
TINY = dict(width=16, depth=2, heads=2, patch=8, image_size=16, embed_dim=8, dtype="float32")


def pictures(rows=3, size=16, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, size, size, 3)).astype(np.float32)


def row_keys(rows, first=0):
    return jax.vmap(jax.random.key)(jnp.arange(first, first + rows))


def random_params(tower, x, scale=0.3):
    """Random parameters, none all zeros or ones, made without compiling `init`."""
    random = np.random.default_rng(1)
    shapes = jax.eval_shape(tower.init, jax.random.key(0), x)
    return jax.tree.map(lambda v: scale * random.normal(size=v.shape).astype(v.dtype), shapes)


@pytest.fixture(scope="module")
def params():
    return random_params(ViT(**TINY), pictures())


def S(shape, phase, scale=1.0):
    return (scale * np.sin(phase + 0.7 * np.arange(np.prod(shape)))).reshape(shape)


def oracle_params(entry, heads):
    """The oracle's torch-shaped parameters under this project's names and layouts."""
    torch = {name: S(shape, i, 0.3) for i, (name, shape) in enumerate(entry["param_order"])}
    width = torch["ln_post.weight"].size

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
        "class_embedding": torch["class_embedding"],
        "positional_embedding": torch["positional_embedding"],
        "patch_embedding": {"kernel": torch["conv1.weight"].transpose(2, 3, 1, 0)},
        "ln_pre": norm("ln_pre"),
        "transformer": {f"block_{i}": block(f"transformer.resblocks.{i}.") for i in range(2)},
        "ln_post": norm("ln_post"),
        "projection": {"kernel": torch["proj"]},
    }


@pytest.mark.parametrize("dtype,tolerance", [("float64", 1e-9), ("float32", 1e-5)])
def test_equals_the_reference(dtype, tolerance):
    entry = ORACLES["vit_tiny"]
    vit = ViT(
        width=8,
        depth=2,
        heads=2,
        patch=16,
        image_size=32,
        embed_dim=4,
        activation="quick_gelu",
        dtype=dtype,
    )
    with jax.enable_x64(dtype == "float64"):
        x = S((2, 3, 32, 32), 0.2).transpose(0, 2, 3, 1)
        params, x = jax.tree.map(lambda v: jnp.asarray(v, dtype), (oracle_params(entry, 2), x))
        out = jax.jit(vit.apply)({"params": params}, x)
        found = {
            "embed": out.raw,
            "patch_tokens_before_ln_post": out.tokens,
            "cls_after_ln_post": out.backbone,
        }
        for name, value in found.items():
            assert value.dtype == dtype
            atol = tolerance * np.abs(entry[name]).max()
            np.testing.assert_allclose(value, entry[name], rtol=0, atol=atol, err_msg=name)


def test_frozen_patches_learn_nothing_and_change_nothing_else(params):
    """The patch embedding gets no gradient, as in DeCLIP's code; the pixels keep theirs."""

    def step(freeze):
        vit = ViT(**TINY, freeze_patches=freeze)

        def loss(params, x):
            return vit.apply(params, x).unit[:, 0].sum()

        return jax.jit(jax.value_and_grad(loss, (0, 1)))(params, pictures())

    (value, (learned, pixels)), (other, (frozen, same)) = step(False), step(True)
    assert value == other and np.any(pixels)
    np.testing.assert_array_equal(pixels, same)
    kernels = [g["params"].pop("patch_embedding")["kernel"] for g in (learned, frozen)]
    assert np.any(kernels[0]) and not np.any(kernels[1])
    jax.tree.map(np.testing.assert_array_equal, learned, frozen)


def value_and_grad(params, **options):
    vit, x, keys = ViT(**TINY, **options), jnp.asarray(pictures()), row_keys(3)

    def loss(params):
        out = vit.apply(params, x, train=True, keys=keys)
        return (out.unit[0] * out.unit[1]).sum() + jnp.square(out.tokens).mean()

    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.slow  # compiles a tower six ways
def test_scan_and_remat_change_nothing(params):
    value, grad = value_and_grad(params, dropout=0.2)
    stacked = stack_blocks(params)
    assert set(stacked["params"]["transformer"]) == {"blocks"}
    shapes = random_params(ViT(**TINY, scan=True), pictures())
    assert jax.tree.map(np.shape, shapes) == jax.tree.map(np.shape, stacked)
    jax.tree.map(np.testing.assert_array_equal, params, unstack_blocks(stacked))
    for options in (dict(remat="full"), dict(scan=True, remat="dots")):
        start = stacked if "scan" in options else params
        other, other_grad = value_and_grad(start, dropout=0.2, **options)
        np.testing.assert_allclose(other, value, rtol=1e-5)
        if "scan" in options:
            other_grad = unstack_blocks(other_grad)
        for a, b in zip(jax.tree.leaves(grad), jax.tree.leaves(other_grad), strict=True):
            np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-6)


def test_a_row_depends_on_its_picture_and_key_alone(params):
    vit = ViT(**TINY, dropout=0.3)
    encode = jax.jit(lambda x, keys: vit.apply(params, x, train=True, keys=keys))
    x, keys = pictures(), row_keys(3)
    out = encode(x, keys)
    changed = encode(
        np.concatenate([x[:1], pictures(2, seed=1)]), jnp.concatenate([keys[:1], row_keys(2, 9)])
    )
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0], b[0]), out, changed)
    assert not np.allclose(out.raw[1], changed.raw[1])
    part = encode(x[1:], keys[1:])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[1:], b, atol=1e-5), out, part)
    same = encode(np.stack([x[0], x[0], x[0]]), keys)
    assert not np.allclose(same.raw[0], same.raw[1])  # another key, another mask


def test_dropout_scales_what_it_keeps():
    x = jnp.ones((4, 50, 40))
    y = np.asarray(drop(x, 0.25, row_keys(4), 3))
    assert set(np.unique(y)) == {0, np.float32(1 / 0.75)}
    np.testing.assert_allclose(y.mean((1, 2)), 1, atol=0.05)
    assert not np.array_equal(y, drop(x, 0.25, row_keys(4), 4))  # another layer, another mask


def test_dropout_is_on_in_training_alone_and_needs_keys():
    assert dropout_keys(0.3, False, row_keys(1)) is None
    assert dropout_keys(0.0, True, None) is None
    with pytest.raises(ValueError, match="needs `keys`"):
        dropout_keys(0.3, True, None)


@pytest.mark.parametrize("pool,dtype", [("mean", "float32"), ("attention", "bfloat16")])
def test_pools_without_a_class_token(pool, dtype):
    vit = ViT(**{**TINY, "dtype": dtype, "embed_dim": 0}, pool=pool, pre_norm=False)
    params = random_params(vit, pictures())
    assert not {"class_embedding", "ln_pre", "projection"} & set(params["params"])
    out = jax.jit(vit.apply)(params, pictures() * 100)
    assert out.tokens.shape == (3, 4, 16) and out.raw.shape == (3, 16)
    assert out.raw.dtype == dtype and out.unit.dtype == jnp.float32
    np.testing.assert_array_equal(out.raw, out.backbone)
    np.testing.assert_allclose(np.linalg.norm(out.unit, axis=-1), 1, rtol=1e-5)
    if pool == "mean":  # the mean is taken over the tokens after ln_post
        tokens = np.asarray(out.tokens)
        centred = tokens - tokens.mean(-1, keepdims=True)
        norm, gain = params["params"]["ln_post"], 1 / np.sqrt(tokens.var(-1, keepdims=True) + 1e-5)
        expected = (centred * gain * norm["scale"] + norm["bias"]).mean(1)
        np.testing.assert_allclose(out.backbone, expected, atol=1e-5)


def test_unit_is_finite_for_zero_rows():
    value, grad = jax.value_and_grad(lambda x: unit(x).sum())(jnp.zeros((2, 4)))
    assert value == 0 and np.isfinite(grad).all()
    assert unit(jnp.ones((2, 4), jnp.bfloat16)).dtype == jnp.float32
    np.testing.assert_allclose(unit(jnp.full((1, 4), 3e18)), 0.5, rtol=1e-6)


@pytest.mark.parametrize(
    "variant,embed_dim,head_width,parameters",  # open_clip's counts of its visual towers
    [
        ("ViT-B/32", 512, 64, 87_849_216),
        ("ViT-L/14", 768, 64, 303_966_208),
        ("ViT-H/14", 1024, 80, 632_076_800),
        ("ViT-g/14", 1024, 88, 1_012_645_632),
        ("ViT-bigG/14", 1280, 104, 1_844_907_264),
    ],
)
def test_published_sizes(variant, embed_dim, head_width, parameters):
    vit = ViT(variant=variant, embed_dim=embed_dim, scan=True)
    shapes = jax.eval_shape(vit.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
    assert sum(v.size for v in jax.tree.leaves(shapes)) == parameters
    assert vit.shape[2] * head_width == vit.shape[0]


def test_names_decode():
    assert ViT(variant="ViT-g/14").shape == (1408, 40, 16, 6144, 14)
    assert ViT(variant="ViT-bigG/14").shape == (1664, 48, 16, 8192, 14)
    assert ViT(variant="ViT-S/16", width=128, depth=4, heads=2).shape == (128, 4, 2, 512, 16)


@pytest.mark.parametrize(
    "fields,words",
    [
        (dict(variant="vit-b32"), "did you mean 'ViT-B/32'"),
        (dict(variant="ViT-B-16"), "did you mean 'ViT-B/16'"),
        (dict(variant=""), "one of ViT-Ti/32"),
        (dict(image_size=225), "ViT.image_size"),
        (dict(heads=5), "ViT.heads"),
        (dict(patch=0), "ViT.patch"),
        (dict(dropout=1.0), "ViT.dropout"),
        (dict(embed_dim=-1), "ViT.embed_dim"),
    ],
)
def test_impossible_fields_are_config_errors(fields, words):
    with pytest.raises(ConfigError) as error:
        bind(ViT, fields, where="ViT")
    assert words in str(error.value)


def test_wrong_picture_size_is_named(params):
    with pytest.raises(ValueError, match=r"ViT.image_size=16, but images of \(3, 24, 24, 3\)"):
        ViT(**TINY).apply(params, jnp.asarray(pictures(size=24)))
