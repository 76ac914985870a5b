"""How a row's logits become one number: the log of their exponentials' sum, and others."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from clipx.losses.tiles import NEVER


class Reduction(NamedTuple):
    """How logits become one number for each row, piece by piece."""

    start: float  # of no logits
    of: Callable  # (logits, axis)
    join: Callable  # of the numbers of two pieces
    slope: Callable | None  # (logits, the whole row's number): derivative by each logit
    share: Callable | None = None  # (numbers of pieces [B], axes): a device's of the joined ones


def _share_log_sum_exp(pieces, axes):
    peak = lax.pmax(pieces, axes)
    total = lax.psum_scatter(jnp.exp(pieces - peak), axes, tiled=True)
    own = lax.axis_index(axes) * total.shape[0]
    return jnp.log(total) + lax.dynamic_slice_in_dim(peak, own, total.shape[0])


LOG_SUM_EXP = Reduction(
    NEVER,
    jax.nn.logsumexp,
    jnp.logaddexp,
    lambda logits, whole: jnp.exp(logits - whole),
    _share_log_sum_exp,
)
SUM_SOFTPLUS = Reduction(
    0.0,
    lambda logits, axis: jnp.sum(jax.nn.softplus(logits), axis=axis),
    jnp.add,
    lambda logits, whole: jax.nn.sigmoid(logits),
)
LARGEST = Reduction(NEVER, jnp.max, jnp.maximum, None)
