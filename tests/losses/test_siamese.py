"""SimSiam's loss equals the reference's numbers, and is finite at the edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import load_oracle

from clipx import losses

ORACLE = load_oracle("declip")


@pytest.mark.parametrize("wide", [True, False], ids=["float64", "float32"])
def test_simsiam_is_declips(wide):
    """`simsiam`: the loss and its gradient by p1; z gets no gradient."""
    oracle = ORACLE["simsiam"]
    with jax.enable_x64(wide):
        views = [np.sin(p + 0.7 * np.arange(24.0)).reshape(4, 6) for p in (0.1, 0.2, 0.3, 0.4)]

        def mean(p1, z1, p2, z2):
            return jnp.mean(losses.simsiam(p1, z1, p2, z2))

        step = jax.jit(jax.value_and_grad(mean, (0, 1, 3)))
        value, (d_p1, d_z1, d_z2) = step(*map(jnp.asarray, views))
        close = {"rtol": 0, "atol": 1e-9 if wide else 1e-6}
        np.testing.assert_allclose(value, oracle["loss"], **close)
        np.testing.assert_allclose(d_p1, oracle["grad_p1"], **close)
        assert oracle["grad_z1_is_none"] and not np.any(d_z1) and not np.any(d_z2)


def test_finite_in_bfloat16_even_for_zero_rows():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6)), jnp.bfloat16)
    for p, z in ((x, x), (1e4 * x, -x), (0 * x, x), (x, 0 * x)):
        each, slope = jax.vjp(lambda p, z=z: losses.simsiam(p, z, p, z), p)
        assert each.dtype == jnp.float32 and jnp.all(jnp.abs(each) <= 1 + 1e-5)
        assert jnp.all(jnp.isfinite(slope(jnp.ones(4))[0]))
    np.testing.assert_allclose(losses.simsiam(x, x, x, x), -1, atol=1e-5)
