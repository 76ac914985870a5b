"""Losses of two views of one image that need no negatives."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Float

from clipx.types import Array


def _cosine(x: Float[Array, "b d"], y: Float[Array, "b d"]) -> Float[Array, " b"]:
    wide = jnp.promote_types(x.dtype, jnp.float32)
    x, y = x.astype(wide), y.astype(wide)

    def inverse_norm(x: Array) -> Array:  # clipped at rows of length 1e-6, so no gradient is NaN
        return jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1), 1e-12))

    return jnp.sum(x * y, axis=-1) * inverse_norm(x) * inverse_norm(y)


def simsiam(
    p1: Float[Array, "b d"],
    z1: Float[Array, "b d"],
    p2: Float[Array, "b d"],
    z2: Float[Array, "b d"],
) -> Float[Array, " b"]:
    """-(cos(p1, z2) + cos(p2, z1)) / 2 of each row, in [-1, 1], float32 at least.

    p are the predictions and z the projections of the two views. No gradient flows into z. Rows
    need not be normalised. Source: SimSiam (arXiv 2011.10566), algorithm 1.
    """
    z1, z2 = jax.lax.stop_gradient((z1, z2))
    return -0.5 * (_cosine(p1, z2) + _cosine(p2, z1))
