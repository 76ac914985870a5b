from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import load_oracle

from clipx.errors import ConfigError
from clipx.models.layers import BatchNorm
from clipx.models.resnet import AttentionPool, ResNet

ORACLES = load_oracle("declip")
TINY = dict(variant="RN50", width=2, blocks=(1, 1), image_size=16, embed_dim=4, dtype="float32")


def S(shape, phase, scale=1.0):
    return (scale * np.sin(phase + 0.7 * np.arange(np.prod(shape)))).reshape(shape)


def pool_params(torch, heads):
    """Attention-pool parameters, from torch's names and layouts to this project's."""

    def split(name):
        width = torch[name + ".weight"].shape[1]
        kernel = torch[name + ".weight"].T.reshape(width, heads, -1)
        return kernel, torch[name + ".bias"].reshape(heads, -1)

    (q, q_bias), (k, k_bias), (v, v_bias) = map(split, ("q_proj", "k_proj", "v_proj"))
    kv = {"kernel": np.stack([k, v], 1), "bias": np.stack([k_bias, v_bias])}
    attn = {"q": {"kernel": q, "bias": q_bias}, "kv": kv}
    return {"positional_embedding": torch["positional_embedding"], "attn": attn}


@pytest.mark.parametrize("dtype,tolerance", [("float64", 1e-9), ("float32", 1e-5)])
def test_attention_pool_equals_the_reference(dtype, tolerance):
    entry = ORACLES["attnpool"]
    torch = {name: S(shape, i, 0.5) for i, (name, shape) in enumerate(entry["param_order"])}
    with jax.enable_x64(dtype == "float64"):
        tokens = S((2, 8, 3, 3), 0.2).reshape(2, 8, 9).swapaxes(1, 2)
        params, tokens = jax.tree.map(
            lambda v: jnp.asarray(v, dtype), (pool_params(torch, 2), tokens)
        )
        pooled = jax.jit(AttentionPool(2, dtype).apply)({"params": params}, tokens)
        assert pooled.dtype == dtype
        found = np.asarray(pooled) @ torch["c_proj.weight"].T + torch["c_proj.bias"]
    np.testing.assert_allclose(found, entry["out"], rtol=tolerance, atol=0)


def test_batch_norm_keeps_torchs_running_statistics():
    entry = ORACLES["projection_mlp"]
    torch = {name: S(shape, i, 0.5) for i, (name, shape) in enumerate(entry["param_order"])}
    with jax.enable_x64(True):
        x = np.cos(3 * S((4, 5), 1.3)) @ torch["linear1.weight"].T + torch["linear1.bias"]
        x = jnp.asarray(x)
        stats = {"mean": jnp.zeros(6, "float64"), "var": jnp.ones(6, "float64")}
        params = {"scale": torch["bn1.weight"], "bias": torch["bn1.bias"]}
        norm = BatchNorm("float64")
        y, new = norm.apply(
            {"params": params, "batch_stats": stats}, x, train=True, mutable="batch_stats"
        )
        new = new["batch_stats"]
        np.testing.assert_allclose(new["mean"], entry["bn1_running_mean"], rtol=1e-12)
        np.testing.assert_allclose(new["var"], entry["bn1_running_var"], rtol=1e-12)
        exact = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) * params["scale"] + params["bias"]
        np.testing.assert_allclose(y, exact, rtol=1e-10)
        y = norm.apply({"params": params, "batch_stats": new}, x)
        exact = (x - new["mean"]) / np.sqrt(new["var"] + 1e-5) * params["scale"] + params["bias"]
        np.testing.assert_allclose(y, exact, rtol=1e-10)


def torch_value(path, leaf):
    """The value of a parameter: a formula of the name and shape that it has in torch."""
    *modules, kind = (p.key for p in path)
    if modules[:1] == ["projection"]:
        modules = ["attnpool", "c_proj"]
    if modules and modules[0].startswith("stage_"):
        _, stage, block = modules[0].split("_")
        modules[:1] = [f"layer{int(stage) + 1}", block]
        last = {"conv_shortcut": "downsample.0", "bn_shortcut": "downsample.1"}
        modules[-1] = last.get(modules[-1], modules[-1])
    name = ".".join([*modules, "bias" if kind == "bias" else "weight"])
    shape = leaf.shape
    if len(shape) == 4:  # [h, w, in, out] from [out, in, h, w]
        torch = S((shape[3], shape[2], *shape[:2]), sum(name.encode()) / 10, 0.5)
        return torch.transpose(2, 3, 1, 0)
    return S(shape[::-1], sum(name.encode()) / 10, 0.5).T


def attnpool_values(width, tokens):
    shapes = {"positional_embedding": (tokens, width)}
    for name in "qkv":
        shapes |= {f"{name}_proj.weight": (width, width), f"{name}_proj.bias": (width,)}
    return {k: S(s, sum(f"attnpool.{k}".encode()) / 10, 0.5) for k, s in shapes.items()}


# One training step of open_clip's ModifiedResNet([2, 1, 1, 1], output_dim=3, heads=2,
# image_size=64, width=4) and of torchvision's ResNet(BasicBlock or Bottleneck, [2, 1, 1, 1]), in
# float64, with the parameters of `torch_value`: the first outputs, and the running variance of one
# BatchNorm of layer4.0 after the step (modified: the last, plain: the second).
GOLDEN = [
    (
        dict(variant="RN50", width=4, embed_dim=3),
        [
            [-9.7824573722008, -4.7264513353081, 11.0922744617789],
            [-9.7842507771122, -4.6927565617624, 11.0897168988940],
        ],
        [0.9010262613841, 0.9003837992517, 0.9004102708727],
    ),
    (
        dict(variant="resnet18", embed_dim=0),
        [
            [0.1874175300600, 0.0863642720047, 0.4375306094130],
            [0.1807648744573, 0.1025109224855, 0.3721941549211],
        ],
        [32.4208489510313, 46.1836393859412, 19.3557656699257],
    ),
    (
        dict(variant="resnet50", embed_dim=0),
        [
            [0.1131885983834, 0.2207303251018, 0.3460631772828],
            [0.0812723924856, 0.1723311353077, 0.2594025267580],
        ],
        [20.0041205231812, 7.8496599687799, 7.3347169989277],
    ),
]


@pytest.mark.parametrize("fields,expected,variance", GOLDEN)
def test_equals_open_clip_and_torchvision(fields, expected, variance):
    resnet = ResNet(blocks=(2, 1, 1, 1), image_size=64, dtype="float64", **fields)
    with jax.enable_x64(True):
        x = jnp.asarray(S((2, 64, 64, 3), 0.2))
        shapes = jax.eval_shape(resnet.init, jax.random.key(0), x)
        pool = shapes["params"].pop("pool", None)
        params = jax.tree_util.tree_map_with_path(torch_value, shapes["params"])
        if pool:
            params["pool"] = pool_params(attnpool_values(128, 5), 2)
        stats = jax.tree_util.tree_map_with_path(
            lambda path, v: jnp.full(v.shape, float(path[-1].key == "var")), shapes["batch_stats"]
        )
        apply = jax.jit(lambda v: resnet.apply(v, x, train=True, mutable="batch_stats"))
        out, new = apply({"params": params, "batch_stats": stats})
        np.testing.assert_allclose(out.raw[:, :3], expected, rtol=1e-9)
        norm = "bn3" if pool else "bn2"
        found = new["batch_stats"]["stage_3_0"][norm]["var"][:3]
        np.testing.assert_allclose(found, variance, rtol=1e-9)


def test_blocks_start_as_their_shortcut():
    @jax.jit
    def start():
        variables = ResNet(**TINY).init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
        scales = [variables["params"][name]["bn3"]["scale"] for name in ("stage_0_0", "stage_1_0")]
        return scales, variables["batch_stats"]

    scales, stats = start()
    assert not np.any(scales[0]) and not np.any(scales[1])
    for path, value in jax.tree.leaves_with_path(stats):  # `init` does not update them
        assert (value == (path[-1].key == "var")).all()


def test_rows_are_independent_in_evaluation():
    resnet = ResNet(**TINY)
    random = np.random.default_rng(0)
    x = random.normal(size=(3, 16, 16, 3)).astype(np.float32)
    shapes = jax.eval_shape(resnet.init, jax.random.key(0), x)
    variables = jax.tree.map(lambda v: random.uniform(size=v.shape).astype(v.dtype), shapes)
    encode = jax.jit(resnet.apply)
    out, changed = encode(variables, x), encode(variables, np.concatenate([x[:1], -x[1:]]))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0], b[0]), out, changed)
    assert not np.allclose(out.raw[1], changed.raw[1])
    assert out.tokens.shape == (3, 4, 16) and out.raw.shape == (3, 4)
    assert out.backbone.shape == (3, 16)
    kept = resnet.clone(frozen_statistics=True).apply(variables, x, train=True)
    np.testing.assert_allclose(kept.raw, out.raw, rtol=1e-5)


def test_the_last_map_is_sown_and_perturbed_only_on_request():
    resnet = ResNet(**{**TINY, "blocks": (1,)})
    random = np.random.default_rng(0)
    x = random.normal(size=(3, 16, 16, 3)).astype(np.float32)
    shapes = jax.eval_shape(resnet.init, jax.random.key(0), x)
    assert set(shapes) == {"params", "batch_stats"}
    train = functools.partial(resnet.apply, train=True, mutable="batch_stats")
    assert set(jax.eval_shape(train, shapes, x)[1]) == {"batch_stats"}

    @jax.jit
    def perturbed(variables, by):
        noise = {"last_map": jnp.full((3, 4, 4, 8), by)}
        variables = {**variables, "perturbations": noise}
        out, kept = resnet.apply(variables, x, mutable="intermediates")
        return out, kept["intermediates"]["last_map"]

    variables = jax.tree.map(lambda v: random.uniform(size=v.shape).astype(v.dtype), shapes)
    (out, last), (moved, same) = perturbed(variables, 0.0), perturbed(variables, 1.0)
    np.testing.assert_array_equal(last, same)
    np.testing.assert_array_equal(last.reshape(out.tokens.shape), out.tokens)
    np.testing.assert_allclose(moved.tokens, out.tokens + 1, rtol=1e-5)
    assert not np.allclose(moved.backbone, out.backbone)


def test_bfloat16_is_finite_in_value_and_gradient():
    resnet = ResNet(**{**TINY, "dtype": "bfloat16", "blocks": (1,)})
    x = jnp.zeros((2, 16, 16, 3))  # two equal rows without any variance
    shapes = jax.eval_shape(resnet.init, jax.random.key(0), x)
    variables = jax.tree.map(lambda v: jnp.full(v.shape, 0.3, v.dtype), shapes)

    def loss(params):
        variables["params"] = params
        out, _ = resnet.apply(variables, x, train=True, mutable="batch_stats")
        return out.unit.sum() + out.tokens.astype(jnp.float32).sum(), out

    grad, out = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    assert out.raw.dtype == jnp.bfloat16 and out.unit.dtype == jnp.float32
    assert all(np.isfinite(v).all() for v in jax.tree.leaves((grad, out.unit)))
    assert all(v.dtype == jnp.float32 for v in jax.tree.leaves(grad))


@pytest.mark.parametrize(
    "variant,embed_dim,image_size,parameters",
    [  # open_clip's RN50 without text tower (63,690,240) and logit scale; torchvision's without fc
        ("RN50", 1024, 224, 102_007_137 - 63_690_240 - 1),
        ("resnet18", 0, 224, 11_689_512 - 513_000),
        ("resnet152", 0, 224, 60_192_808 - 2_049_000),
    ],
)
def test_published_sizes(variant, embed_dim, image_size, parameters):
    resnet = ResNet(variant=variant, embed_dim=embed_dim)
    x = jnp.zeros((1, image_size, image_size, 3))
    shapes = jax.eval_shape(resnet.init, jax.random.key(0), x)
    assert sum(v.size for v in jax.tree.leaves(shapes["params"])) == parameters


@pytest.mark.parametrize(
    "fields,words",
    [
        (dict(variant="RN51"), "did you mean 'RN50'"),
        (dict(variant="ResNet-18"), "did you mean 'resnet18'"),
        (dict(image_size=100), "ResNet.image_size"),
        (dict(width=3), "ResNet.width"),
        (dict(blocks=()), "ResNet.blocks"),
    ],
)
def test_impossible_fields_are_config_errors(fields, words):
    with pytest.raises(ConfigError) as error:
        ResNet(**fields)
    assert words in str(error.value)
