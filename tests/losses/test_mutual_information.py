"""CLIP-Lite's two losses of logits equal their formulas, also at extreme logits."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipx import losses

POSITIVE = np.array([-3.0, 0.0, 2.5])
NEGATIVE = np.array([1.0, -4.0, 0.5])


def test_formulas():
    with jax.enable_x64(True):
        right, wrong = -np.log(1 + np.exp(-POSITIVE)), -np.log(1 + np.exp(NEGATIVE))
        values = losses.jsd(POSITIVE, NEGATIVE)
        np.testing.assert_allclose(values, -right - wrong, rtol=1e-14)
        weight = np.array([0.0, 1.5, 1.5])
        values = losses.jsd(POSITIVE, NEGATIVE, weight=weight)
        np.testing.assert_allclose(values, -right - weight * wrong, rtol=1e-14)
        real, noise = (1 / (1 + np.exp(-x)) for x in (POSITIVE, NEGATIVE))
        values = losses.prior(POSITIVE, NEGATIVE)
        np.testing.assert_allclose(values, -np.log(noise) - np.log(1 - real), rtol=1e-14)


@pytest.mark.parametrize("loss", [losses.jsd, losses.prior])
def test_a_loss_of_zero_logits_is_two_bits(loss):
    np.testing.assert_allclose(loss(jnp.zeros(4), jnp.zeros(4)), 2 * math.log(2), rtol=1e-6)


@pytest.mark.parametrize("loss", [losses.jsd, losses.prior])
def test_half_precision_does_not_overflow(loss):
    """At scores whose sigmoid is 0 or 1 in bfloat16, so that its logarithm would be -inf."""
    ends = jnp.array([100.0, -100.0, 100.0, -100.0], jnp.bfloat16)
    other = jnp.array([100.0, 100.0, -100.0, -100.0], jnp.bfloat16)
    value, grads = jax.value_and_grad(lambda x: loss(*x).sum())((ends, other))
    assert value.dtype == jnp.float32 and np.isclose(value, 400.0)
    assert all(np.isfinite(np.asarray(g, np.float32)).all() for g in grads)
    assert all(np.abs(np.asarray(g, np.float32)).max() == 1 for g in grads)
