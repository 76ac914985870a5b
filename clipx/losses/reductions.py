"""Reductions of a row's logits to one number: log-sum-exp, sum of softplus, largest."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from clipx.losses.pairwise import NEVER


class Reduction(NamedTuple):
    """A reduction that can be taken tile by tile: `of(each(logits))`, then `join`."""

    start: float  # the reduction of no logits
    each: Callable  # logits -> elements
    of: Callable  # (elements, axis) -> numbers
    join: Callable  # the numbers of two tiles -> those of both together
    slope: Callable | None  # (logits, the row's number) -> derivative by each logit
    # Joins the numbers [B] of all devices and returns each device's own [B/devices]. The first, of
    # (numbers, axes), has no gradient; the second, of (numbers, axes, the own rows' places), has.
    share: Callable | None = None
    share_differentiably: Callable | None = None

    def reduce(self, logits: Float[Array, "c t"], axis: int) -> Float[Array, " _"]:
        """The number of each row (axis 1) or column (axis 0) of a tile."""
        return self.of(self.each(logits), axis=axis)


def _share_log_sum_exp(pieces, axes):
    peak = lax.pmax(pieces, axes)
    total = lax.psum_scatter(jnp.exp(pieces - peak), axes, tiled=True)
    own = lax.axis_index(axes) * total.shape[0]
    return jnp.log(total) + lax.dynamic_slice_in_dim(peak, own, total.shape[0])


def _share_log_sum_exp_differentiably(pieces, axes, index):
    peak = lax.pmax(lax.stop_gradient(pieces), axes)
    total = lax.psum_scatter(jnp.exp(pieces - peak), axes, tiled=True)
    return jnp.log(total) + peak[index]


LOG_SUM_EXP = Reduction(
    start=NEVER,
    each=lambda logits: logits,
    of=jax.nn.logsumexp,
    join=jnp.logaddexp,
    slope=lambda logits, whole: jnp.exp(logits - whole),
    share=_share_log_sum_exp,
    share_differentiably=_share_log_sum_exp_differentiably,
)
SUM_SOFTPLUS = Reduction(
    start=0.0,
    each=jax.nn.softplus,
    of=jnp.sum,
    join=jnp.add,
    slope=lambda logits, whole: jax.nn.sigmoid(logits),
)
LARGEST = Reduction(
    start=NEVER, each=lambda logits: logits, of=jnp.max, join=jnp.maximum, slope=None
)
