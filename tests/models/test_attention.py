"""The TPU's attention kernel, interpreted on the CPU, against attention in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from support.tpu import libtpu

from clipx.models import layers, transformer
from clipx.models.attention import attention, has_kernel, packed_attention
from clipx.parallel.chips import parse
from clipx.parallel.mesh import MeshConfig, batch_sharding, make_mesh, replicated
from clipx.planning import hlo
from clipx.types import on_tpu


def split(packed, heads):
    """[b, n, heads * 3 * d] -> queries, keys and values [b, n, heads, d]."""
    x = packed.reshape(*packed.shape[:2], heads, 3, -1)
    return x[..., 0, :], x[..., 1, :], x[..., 2, :]


def inputs(rows, tokens, heads, d, dtype):
    keys = jax.random.split(jax.random.key(tokens), 2)
    packed = 2 * jax.random.normal(keys[0], (rows, tokens, heads * 3 * d))
    return packed.astype(dtype), jax.random.normal(keys[1], (rows, tokens, heads * d)).astype(dtype)


def with_gradient(fn, packed, dy):
    y, pull = jax.vjp(fn, packed)
    return y, pull(dy.astype(y.dtype))[0]


def distances(values, exact):
    """(root mean square error, largest error), both relative."""
    wrong = np.abs(np.asarray(values, np.float64) - exact)
    norm = np.linalg.norm
    return norm(wrong) / norm(exact), np.max(wrong) / np.max(np.abs(exact))


@pytest.mark.parametrize(
    "rows, tokens, heads, d, causal, masked, dtype",
    [
        (2, 197, 1, 64, False, False, "float32"),
        pytest.param(2, 197, 2, 64, False, False, "bfloat16", marks=pytest.mark.slow),
        (3, 77, 1, 64, True, True, "bfloat16"),
        pytest.param(2, 50, 1, 32, False, True, "float32", marks=pytest.mark.slow),
        (4, 9, 2, 24, True, True, "float32"),
    ],
)
def test_values_and_gradients(rows, tokens, heads, d, causal, masked, dtype):
    """The kernel's mean error is that of attention without the kernel. Its largest error may be a
    little larger, because the rounding of single elements depends on the processor."""
    packed, dy = inputs(rows, tokens, heads, d, dtype)
    lengths = jnp.arange(1, rows + 1) * tokens // rows if masked else None

    def plain(x):
        y = attention(*split(x, heads), causal=causal, lengths=lengths)
        return y.reshape(*y.shape[:2], -1)

    def kernel(x):
        return packed_attention(x, lengths, heads=heads, causal=causal, interpret=True)

    @jax.jit
    def both(packed, dy):
        return with_gradient(kernel, packed, dy), with_gradient(plain, packed, dy)

    found, usual = both(packed, dy)
    with jax.enable_x64(True):
        wide = packed.astype("float64"), dy.astype("float64")
        exact = [np.asarray(x) for x in jax.jit(partial(with_gradient, plain))(*wide)]
    for mine, theirs, truth in zip(found, usual, exact, strict=True):
        assert mine.dtype == jnp.dtype(dtype)
        (mean, most), (usual_mean, usual_most) = distances(mine, truth), distances(theirs, truth)
        assert mean <= 1.5 * usual_mean and most <= 3 * usual_most


def test_rows_are_alone():
    packed, dy = inputs(4, 19, 2, 16, "bfloat16")
    fn = jax.jit(
        lambda x, dy: with_gradient(lambda x: packed_attention(x, heads=2, interpret=True), x, dy)
    )
    for whole, part in zip(fn(packed, dy), fn(packed.at[1].set(7), dy), strict=True):
        rows = [0, 2, 3]
        np.testing.assert_array_equal(np.asarray(whole)[rows], np.asarray(part)[rows])


def test_meshes():
    """Rows and heads stay on their devices, and the results equal those of one device."""
    packed, dy = inputs(8, 5, 2, 8, "float32")
    lengths = jnp.arange(8) % 5 + 1

    def fn(packed, dy):
        return with_gradient(
            lambda x: packed_attention(x, lengths, heads=2, causal=True, interpret=True), packed, dy
        )

    alone = jax.jit(fn)(packed, dy)
    with jax.set_mesh(make_mesh(MeshConfig(2, 2, 2))):
        spread = jax.jit(fn)(packed, dy)
        traced = str(jax.make_jaxpr(fn)(packed, dy))
    assert "shard_map" in traced
    for one, many in zip(alone, spread, strict=True):
        np.testing.assert_allclose(one, many, rtol=1e-6, atol=1e-6)


def test_the_platform_is_that_of_the_mesh():
    assert not on_tpu()
    with jax.set_mesh(make_mesh(MeshConfig())):
        assert not on_tpu()
        assert not has_kernel(9, 5, 2, 8, "float32")  # the devices do not divide the rows
        assert has_kernel(16, 5, 2, 8, "float32")
    assert not has_kernel(16, 5, 2, 8, "float64")
    assert not has_kernel(16, 4096, 2, 64, "bfloat16")


@pytest.mark.parametrize("lora", [None, layers.Lora(2, 3.0)])
def test_an_affine_layer_is_the_same_on_tpus(lora, monkeypatch):
    """In values, gradients and initial parameters, with and without `order` and adapters."""
    x = jax.random.normal(jax.random.key(0), (2, 5, 3, 4))
    module = layers.Affine((3, 2, 4), "float32", layers.torch_uniform, inputs=2, lora=lora)

    def run(order):
        def fn(variables, x):
            y = module.apply(variables, x, order=order)
            y = y if order is None else y.reshape(2, 5, 2, 3, 4).swapaxes(2, 3)
            return jnp.sum(jnp.sin(y.reshape(2, 5, 3, 2, 4))), y.reshape(2, 5, 3, 2, 4)

        variables = module.init(jax.random.key(1), x)
        variables = jax.tree.map(lambda p: p + 0.1, variables)
        return variables, jax.grad(fn, (0, 1), has_aux=True)(variables, x)

    usual = run(None)
    monkeypatch.setattr(layers, "on_tpu", lambda: True)
    for found in (run(None), run((1, 0, 2))):
        for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(usual), strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)


def test_a_layer_norm_is_the_same_on_tpus(monkeypatch):
    """In values and gradients, also for rows far from zero and for rows without variance."""
    x = jax.random.normal(jax.random.key(0), (3, 5, 16)) + jnp.array([0, 100, 0])[:, None, None]
    x = x.at[2].set(0.5)
    module = layers.LayerNorm(dtype="float32")
    variables = {"params": {"scale": jnp.linspace(0.5, 2, 16), "bias": jnp.linspace(-1, 1, 16)}}

    def run():
        def fn(variables, x):
            y = module.apply(variables, x)
            return jnp.sum(jnp.sin(y)), y

        return jax.jit(jax.grad(fn, (0, 1), has_aux=True))(variables, x)

    usual = run()
    monkeypatch.setattr(layers, "on_tpu", lambda: True)
    for mine, theirs in zip(jax.tree.leaves(run()), jax.tree.leaves(usual), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-4)
    assert jax.tree.map(jnp.shape, module.init(jax.random.key(0), x)) == jax.tree.map(
        jnp.shape, variables
    )


@pytest.mark.slow  # its kernel and its layers are tested alone
def test_a_transformer_is_the_same_on_tpus(monkeypatch):
    """In values, gradients and dropout, although rows are flattened and padded for the kernel."""
    module = transformer.Transformer(
        depth=2, heads=2, mlp_width=32, causal=True, dropout=0.2, scan=True, remat="full"
    )
    x = jax.random.normal(jax.random.key(0), (3, 7, 16))
    keys, lengths = jax.random.split(jax.random.key(1), 3), jnp.array([7, 3, 5])
    variables = module.init(jax.random.key(2), x, lengths, keys)

    def run():
        def fn(variables, x):
            y = module.apply(variables, x, lengths, keys)
            return jnp.sum(jnp.sin(y)), y

        return jax.jit(jax.grad(fn, (0, 1), has_aux=True))(variables, x)

    usual = run()
    for part in (layers, transformer):
        monkeypatch.setattr(part, "on_tpu", lambda: True)
    monkeypatch.setattr(transformer, "packed_attention", partial(packed_attention, interpret=True))
    for mine, theirs in zip(jax.tree.leaves(run()), jax.tree.leaves(usual), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=2e-5, atol=2e-6)


def products(jaxpr, times=1):
    """FLOPs of the products in a jaxpr, loops multiplied out."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            ((contracted, _), _) = eqn.params["dimension_numbers"]
            depth = np.prod([eqn.invars[0].aval.shape[i] for i in contracted])
            total += 2 * times * int(depth) * eqn.outvars[0].aval.size
        inner = times * eqn.params.get("length", 1)
        total += sum(products(j, inner) for j in jaxprs_in_params(eqn.params))
    return total


def kernels(jaxpr):
    """For each kernel that a jaxpr calls: (declared FLOPs, FLOPs of the products inside)."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "pallas_call":
            grid = int(np.prod(eqn.params["grid_mapping"].grid))
            yield eqn.params["cost_estimate"].flops, grid * products(eqn.params["jaxpr"])
        else:
            for inner in jaxprs_in_params(eqn.params):
                yield from kernels(inner)


def test_kernels_declare_what_they_do():
    """The declared cost covers every product of the kernel, and a little more for the rest."""
    packed, dy = inputs(16, 56, 2, 64, "bfloat16")

    def fn(packed, dy):
        return with_gradient(lambda x: packed_attention(x, heads=2, causal=True), packed, dy)

    found = list(kernels(jax.make_jaxpr(fn)(packed, dy).jaxpr))
    assert len(found) == 2
    for declared, done in found:
        assert done < declared < 1.2 * done


@libtpu
@pytest.mark.parametrize(
    "sizes, causal", [({}, True), ({"data": 2, "tensor": 2}, False)], ids=["data", "tensor"]
)
def test_compiled_for_tpu(sizes, causal):
    """A block's step has the kernel, forward and backward, and its FLOPs count in full."""
    mesh = make_mesh(MeshConfig(**sizes), parse("v5e:2x2").devices())
    rows, tokens, heads, width = 8, 50, 2, 128
    module = transformer.Transformer(
        depth=1, heads=heads, mlp_width=width, causal=causal, dtype="bfloat16"
    )

    def loss(variables, x):
        return jnp.sum(jnp.square(module.apply(variables, x).astype(jnp.float32)))

    x = jax.ShapeDtypeStruct((rows, tokens, width), jnp.bfloat16, sharding=batch_sharding(mesh))
    with jax.set_mesh(mesh):
        assert on_tpu()
        variables = jax.eval_shape(lambda x: module.init(jax.random.key(0), x), x)
        variables = jax.tree.map(
            lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=replicated(mesh)), variables
        )
        found = hlo.read(jax.jit(jax.grad(loss)).lower(variables, x).compile().as_text())
    padded = 56
    products = [round(k.flops / (rows // 4 * padded**2 * 2 * width)) for k in found.kernels]
    assert sorted(products) == [2, 5]
    assert not any(kind == "all-gather" for kind, _ in found.traffic())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_heads_first_on_one_cpu(causal, masked):
    """Among many tokens, values and gradients are those of JAX's own attention."""
    rng = np.random.default_rng(0)
    q, k, v, dy = jnp.asarray(rng.normal(size=(4, 3, 40, 2, 8)), jnp.float32)
    lengths = jnp.array([1, 17, 40]) if masked else None
    seen = jnp.arange(40) < lengths[:, None] if masked else None
    mask = None if seen is None else seen[:, None, None]

    def both(function):
        y, pull = jax.vjp(function, q, k, v)
        return y, *pull(dy)

    ours = both(lambda *x: attention(*x, causal=causal, lengths=lengths))
    plain = both(lambda *x: jax.nn.dot_product_attention(*x, mask=mask, is_causal=causal))
    for a, b in zip(ours, plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
