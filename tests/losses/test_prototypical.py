"""Prototype losses equal the numbers of ProtoCLIP's own code, and plain array code."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from support import load_oracle

from clipx import losses
from clipx.losses import ring
from clipx.parallel.mesh import MeshConfig, batch_sharding, make_mesh, put

ORACLE = load_oracle("protoclip")
WIDE = pytest.mark.parametrize("wide", [True, False], ids=["float64", "float32"])
LABELS = np.array([0, 3, 3, 6, 1, 2])


def sines(r, c, p):
    """The function S of the oracle's `inputs`."""
    return np.sin(0.7 * np.arange(r * c).reshape(r, c) + p)


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def softmax(x):
    x = np.exp(x - x.max(axis=1, keepdims=True))
    return x / x.sum(axis=1, keepdims=True)


@WIDE
@pytest.mark.parametrize("key, temperature", [("soft_tau0.01", 0.01), ("soft_tau0.1", 0.1)])
def test_soft_is_protoclips(key, temperature, wide):
    """`proto.soft_tau0.01`, `proto.soft_tau0.1`"""
    check(ORACLE["proto"][key], temperature, wide)


@WIDE
def test_hard_is_protoclips(wide):
    """`proto.hard`"""
    check(ORACLE["proto"]["hard"], 0, wide)


def check(oracle, temperature, wide):
    """Value, gradients and accuracy. Neither the prototypes nor the teacher get a gradient."""
    close = {"rtol": 1e-9 if wide else 1e-5}

    def loss(rows, log_scale, student, teacher):
        target = losses.targets(teacher, LABELS, temperature=temperature)
        return losses.prototypical(rows, student, target, scale=jnp.exp(log_scale)).mean()

    with jax.enable_x64(wide):
        inputs = unit(sines(6, 5, 0.4)), 0.5 * sines(7, 5, 2.0), 0.6 * sines(7, 5, 3.1)
        rows, student, teacher = (jnp.asarray(x, float) for x in inputs)
        grad = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)))
        value, (d_rows, d_scale, *others) = grad(rows, np.log(1 / 0.07), student, teacher)
        accuracy = losses.prototype_accuracy(rows, student, LABELS)
    assert value.dtype == (np.float64 if wide else np.float32)
    np.testing.assert_allclose(value, oracle["loss"], **close)
    np.testing.assert_allclose(d_scale, oracle["dL_dlogscale"], **close)
    np.testing.assert_allclose(np.abs(d_rows).sum(), oracle["sum_abs_dH"], **close)
    np.testing.assert_allclose(100 * np.mean(accuracy), oracle["acc"], rtol=1e-6)
    assert not any(np.any(x) for x in others)


@WIDE
def test_back_translation_is_protoclips(wide):
    """`pbt`, which is given to seven decimals, and the exact means"""
    oracle, labels = ORACLE["pbt"], np.array([0, 2, 2, 5, 5, 5, 0, 1, 1, 1, 1, 2])
    features = unit(sines(12, 4, 0.9))
    with jax.enable_x64(wide):
        got = losses.back_translate(labels, jnp.asarray(features), 6)
    np.testing.assert_allclose(got, oracle["centroids"], rtol=0, atol=1e-7)
    means = [features[labels == i].mean(axis=0) if i in labels else np.zeros(4) for i in range(6)]
    np.testing.assert_allclose(got, means, rtol=0, atol=1e-9 if wide else 1e-6)
    assert not np.any(got[3:5]) and got.dtype == (np.float64 if wide else np.float32)


def test_the_same_on_a_mesh():
    """Value and gradient with sharded rows and a replicated table."""
    rng = np.random.default_rng(0)
    rows, features = (unit(rng.normal(size=(16, 6))) for _ in range(2))
    labels = rng.integers(0, 9, 16).astype(np.int32)

    def loss(rows, features, labels):
        table = losses.back_translate(labels, features, 9)
        target = losses.targets(table, labels, temperature=0.2)
        each = losses.prototypical(rows, table, target, scale=5.0)
        return each.sum(), (each, table)

    step = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    with jax.enable_x64(True):
        expected = step(rows, features, labels)
        mesh = make_mesh(MeshConfig(4, 2), jax.devices())
        with jax.set_mesh(mesh):
            got = step(*put((rows, features, labels), batch_sharding(mesh)))
            (_, (each, table)), (_, none) = got
    assert not np.any(none) and table.sharding.is_fully_replicated
    assert each.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec(("data", "fsdp"))), 1)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-12)
    product = 5 * rows @ np.asarray(table).T
    wanted = softmax(np.asarray(table)[labels] @ np.asarray(table).T / 0.2)
    plain = -np.sum(wanted * np.log(softmax(product)), axis=1)
    np.testing.assert_allclose(each, plain, rtol=1e-9)


@pytest.mark.parametrize("shape", [(1,), (4, 2)], ids=str)
@pytest.mark.parametrize("hard", [True, False], ids=["labels", "soft"])
def test_the_ring_equals_the_gathered_form(shape, hard, monkeypatch):
    """The form "ring" equals "gather" in value and gradients, in tiles, for a number of prototypes
    that no device count divides. A label outside 0..k-1 costs nothing."""
    monkeypatch.setattr(ring, "TILES", (16, 16))
    rng = np.random.default_rng(0)
    rows, table, teacher = (unit(rng.normal(size=(n, 6))) for n in (16, 11, 11))
    labels = rng.integers(0, 11, 16).astype(np.int32)
    labels[3] = -1 if hard else 3

    def loss(rows, scale, table, teacher, labels, form):
        soft = losses.targets(teacher, labels, temperature=0.2)
        one_hot = losses.targets(table, labels, temperature=0)
        target = (labels if form == "ring" else one_hot) if hard else soft
        each = losses.prototypical(rows, table, target, scale=scale, form=form)
        return jnp.sum(jnp.arange(16) * each), each

    with (
        jax.enable_x64(True),
        jax.set_mesh(make_mesh(MeshConfig(*shape), jax.devices()[: np.prod(shape)])),
    ):
        step = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True), static_argnames="form")
        given = rows, 5.0, table, teacher, labels
        got, expected = (step(*given, form=form) for form in ("ring", "gather"))
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-12)
    assert (np.asarray(got[0][1])[3] == 0) == hard


def test_labels_without_a_prototype_and_values_that_are_not_finite():
    """Rows with labels outside 0..k-1 are in no mean; a NaN stays in its own cluster."""
    x = np.array([[1.0, 2], [np.nan, 1], [3, 4], [5, 6]], np.float32)
    got = losses.back_translate(np.array([-1, 2, 0, 7]), x, 4)
    np.testing.assert_array_equal(got, [[3, 4], [0, 0], [np.nan, 1], [0, 0]])


def test_finite_in_bfloat16_at_scale_100():
    """For identical rows, for prototypes of zeros, at a temperature of 0.01."""
    rows = jnp.asarray(unit(sines(4, 5, 0.1)), jnp.bfloat16)

    def loss(x, table):
        target = losses.targets(table, np.array([0, 1, 1, 6]), temperature=0.01)
        return losses.prototypical(x, table, target, scale=100.0).mean()

    grad = jax.jit(jax.value_and_grad(loss))
    for x, table in ((rows, 3 * sines(7, 5, 1.0)), (rows[:1].repeat(4, 0), np.zeros((7, 5)))):
        value, slope = grad(x, jnp.asarray(table, jnp.bfloat16))
        assert value.dtype == jnp.float32 and jnp.isfinite(value) and jnp.all(jnp.isfinite(slope))
    np.testing.assert_allclose(value, np.log(7), rtol=1e-6)


def test_no_negative_temperature():
    with pytest.raises(ValueError, match="temperature=-1"):
        losses.targets(np.eye(3), np.array([0]), temperature=-1)
