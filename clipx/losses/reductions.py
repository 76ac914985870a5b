"""Reductions of a row's logits to one number: log-sum-exp, sum of softplus, maximum."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float

from clipx.losses.pairwise import NEVER
from clipx.losses.tiles import Axes
from clipx.types import Array


class Reduction(NamedTuple):
    """A reduction that runs tile by tile: `of(each(logits))` per tile, then `join` over tiles."""

    start: float  # the result for no logits at all
    each: Callable  # logits -> elements
    of: Callable  # (elements, axis) -> results
    join: Callable  # (results of one tile, results of another) -> results of both
    slope: Callable | None  # (logits, the row's result) -> derivative of the result by each logit
    # Both join the results [B] of all devices and return the [B/devices] of the device's own rows.
    # `share(results, axes)` is not differentiable. `share_differentiably(results, axes, index)` is;
    # `index` holds the positions of the device's own rows.
    share: Callable | None = None
    share_differentiably: Callable | None = None

    def reduce(self, logits: Float[Array, "c t"], axis: int) -> Float[Array, " _"]:
        """The result of each row (axis 1) or column (axis 0) of a tile."""
        return self.of(self.each(logits), axis=axis)


def _share_log_sum_exp(pieces: Array, axes: Axes) -> Array:
    peak = lax.pmax(pieces, axes)
    total = lax.psum_scatter(jnp.exp(pieces - peak), axes, tiled=True)
    first = lax.axis_index(axes) * total.shape[0]
    return jnp.log(total) + lax.dynamic_slice_in_dim(peak, first, total.shape[0])


def _share_log_sum_exp_differentiably(pieces: Array, axes: Axes, index: Array) -> Array:
    peak = lax.pmax(lax.stop_gradient(pieces), axes)
    total = lax.psum_scatter(jnp.exp(pieces - peak), axes, tiled=True)
    return jnp.log(total) + peak[index]


LOG_SUM_EXP = Reduction(
    start=NEVER,
    each=lambda logits: logits,
    of=jax.nn.logsumexp,
    join=jnp.logaddexp,
    slope=lambda logits, lse: jnp.exp(logits - lse),
    share=_share_log_sum_exp,
    share_differentiably=_share_log_sum_exp_differentiably,
)
SUM_SOFTPLUS = Reduction(
    start=0.0,
    each=jax.nn.softplus,
    of=jnp.sum,
    join=jnp.add,
    slope=lambda logits, _: jax.nn.sigmoid(logits),
)
LARGEST = Reduction(
    start=NEVER, each=lambda logits: logits, of=jnp.max, join=jnp.maximum, slope=None
)
