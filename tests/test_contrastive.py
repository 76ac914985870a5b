"""The sharded, tiled losses against plain dense ones, forward and backward, on every mesh."""

import itertools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipx import losses
from clipx.mesh import MeshConfig, make_mesh

ORACLES = pathlib.Path(__file__).parent / "oracles"


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def rows(b=24, d=6):
    rng = np.random.default_rng(0)
    return unit(rng.normal(size=(b, d))), unit(rng.normal(size=(b, d)))


def strangers(b, ids, groups):
    out = np.zeros((b, b), bool)
    if ids is not None:
        out |= (ids[:, None] == ids[None]) & ~np.eye(b, dtype=bool)
    place = np.arange(b) // (b // groups)
    return out | (place[:, None] != place[None])


def dense_info_nce(a, b, scale, bias, ids=None, groups=1):
    logits = jnp.where(strangers(len(a), ids, groups), -jnp.inf, scale * a @ b.T)
    match = jnp.diag(logits)
    lse = jax.nn.logsumexp
    return 0.5 * (lse(logits, axis=1) - match) + 0.5 * (lse(logits, axis=0) - match)


def dense_sigmoid(a, b, scale, bias, ids=None, groups=1):
    sign = 2 * np.eye(len(a)) - 1
    pairs = -jax.nn.log_sigmoid(sign * (scale * a @ b.T + bias))
    return jnp.sum(jnp.where(strangers(len(a), ids, groups), 0.0, pairs), axis=1)


def info_nce(a, b, scale, bias, **options):
    return losses.info_nce(a, b, scale=scale, **options)


def sigmoid(a, b, scale, bias, **options):
    return losses.sigmoid(a, b, scale=scale, bias=bias, **options)


PAIRS = [(info_nce, dense_info_nce), (sigmoid, dense_sigmoid)]
IDS = np.arange(24) // 2
# Each mesh, each tile size (an uneven last one among them) and each option, not their product.
CASES = [
    *itertools.product([None, (8, 1), (4, 2)], [None, 2], [{}]),
    ((1, 2), None, {}),
    ((2, 2), 4, {"ids": IDS}),
    (None, 7, {"ids": IDS, "groups": 2}),
    ((8, 1), 1, {"groups": 3}),
]


@pytest.mark.parametrize("tiled, dense", PAIRS, ids=["info_nce", "sigmoid"])
def test_value_and_gradients_equal_the_dense_twin(tiled, dense):
    weights = np.random.default_rng(1).normal(size=24)

    def grads(fn, **options):
        def total(a, b, scale, bias):
            return jnp.sum(weights * fn(a, b, scale, bias, **options))

        return jax.jit(jax.value_and_grad(total, (0, 1, 2, 3)))(*rows(), 14.0, -3.0)

    with jax.enable_x64(True):
        for shape, chunk, options in CASES:
            expected = grads(dense, **options)
            if shape is None:
                got = grads(tiled, chunk=chunk, **options)
            else:
                devices = jax.devices()[: shape[0] * shape[1]]
                with jax.set_mesh(make_mesh(MeshConfig(*shape), devices)):
                    got = grads(tiled, chunk=chunk, **options)
            for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
                np.testing.assert_allclose(x, y, rtol=0, atol=1e-12, err_msg=f"{shape} {chunk}")


def test_one_direction_alone():
    a, b = (jnp.asarray(x, jnp.float32) for x in rows())
    logits = 5.0 * a @ b.T
    expected = jax.nn.logsumexp(logits, axis=1) - jnp.diag(logits)
    got = losses.info_nce(a, b, scale=5.0, symmetric=False)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_recall_at_1_counts_ties_as_misses():
    a = np.eye(4, dtype=np.float32)
    b = a[[0, 1, 3, 2]]
    np.testing.assert_array_equal(losses.recall_at_1(a, b), [1, 1, 0, 0])
    np.testing.assert_array_equal(losses.recall_at_1(np.ones_like(a), np.ones_like(a)), np.zeros(4))
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:4])):
        np.testing.assert_array_equal(losses.recall_at_1(a, b), [1, 1, 0, 0])


@pytest.mark.parametrize("loss", [info_nce, sigmoid], ids=["info_nce", "sigmoid"])
def test_finite_in_bfloat16_at_scale_100(loss):
    a, b = (jnp.asarray(x, jnp.bfloat16) for x in rows())
    same = jnp.broadcast_to(a[:1], a.shape)
    for x, y in ((a, b), (same, same), (a, -a), (a[:1], b[:1])):
        total = jax.value_and_grad(lambda x, y: loss(x, y, 100.0, -10.0).mean(), (0, 1))
        for leaf in jax.tree.leaves(jax.jit(total)(x, y)):
            assert jnp.all(jnp.isfinite(leaf))
    assert loss(a, b, 100.0, -10.0).dtype == jnp.float32


def test_rows_that_do_not_spread_say_so():
    a = jnp.ones((6, 4))
    with (
        jax.set_mesh(make_mesh(MeshConfig(), jax.devices())),
        pytest.raises(ValueError, match="multiple of 8"),
    ):
        losses.info_nce(a, a, scale=1.0)
    with pytest.raises(ValueError, match="groups=4"):
        losses.info_nce(a, a, scale=1.0, groups=4)


def oracle_rows(r, c, p):
    return unit(np.sin(0.7 * np.arange(r * c).reshape(r, c) + p))


@pytest.mark.parametrize("wide", [True, False], ids=["float64", "float32"])
def test_info_nce_is_protoclips(wide):
    oracle = json.loads((ORACLES / "protoclip.json").read_text())["clip"]
    with jax.enable_x64(wide):
        image, text = (jnp.asarray(oracle_rows(6, 8, p)) for p in (0, 1.3))

        def loss(image, log_scale):
            return losses.info_nce(image, text, scale=jnp.exp(log_scale)).mean()

        value, (d_image, d_scale) = jax.value_and_grad(loss, (0, 1))(image, np.log(1 / 0.07))
        tolerance = 1e-9 if wide else 1e-5
        np.testing.assert_allclose(value, oracle["loss"], rtol=tolerance)
        np.testing.assert_allclose(d_scale, oracle["dL_dlogscale"], rtol=tolerance)
        np.testing.assert_allclose(jnp.abs(d_image).sum(), oracle["sum_abs_dzI"], rtol=tolerance)


def test_info_nce_is_declips_pairings():
    """The four pairings of the total objective: rows F_i of the oracle's formula, scale exp 3.4."""
    oracle = json.loads((ORACLES / "declip.json").read_text())["declip_objective"]
    k = np.arange(24)

    def sines(phase, scale=1.0):
        return (scale * np.sin(phase + 0.7 * k)).reshape(4, 6)

    with jax.enable_x64(True):
        f = [unit(np.cos((i + 2) * sines(0.1 * i)) + sines(1.0 + i)) for i in range(6)]
        got = [
            losses.info_nce(f[i], f[t], scale=np.exp(3.4)).mean()
            for i, t in ((0, 2), (1, 2), (0, 3), (1, 3))
        ]
        np.testing.assert_allclose(got, oracle["pair_losses_I1T_I2T_I1Ta_I2Ta"], rtol=1e-9)
