"""An exponential moving average of the parameters, kept beside them in the optimizer's state."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from clipx.types import PyTree, TrainState

SUFFIX = "@average"  # of the name of an eval whose metrics are of the averaged parameters


class AverageState(NamedTuple):
    """The state of `keep`."""

    count: jax.Array  # updates so far  # pyright: ignore[reportIncompatibleMethodOverride]
    params: PyTree  # the averages, float32


def keep(decay: float) -> optax.GradientTransformation:
    """Leaves updates as they are, and keeps an average of the parameters after them.

    The average of early updates forgets faster: the decay is at most (1 + n) / (10 + n) after n
    updates, so that an average does not remember what it started from.
    """

    def init(params: PyTree) -> AverageState:
        return AverageState(jnp.int32(0), jax.tree.map(lambda p: p.astype(jnp.float32), params))

    def update(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, AverageState]:
        count = state.count + 1
        kept = jnp.minimum(decay, (1 + count) / (10 + count)).astype(jnp.float32)

        def leaf(average: jax.Array, p: jax.Array, u: jax.Array) -> jax.Array:
            return average + (1 - kept) * ((p + u).astype(jnp.float32) - average)

        return updates, AverageState(count, jax.tree.map(leaf, state.params, params, updates))

    return optax.GradientTransformation(init, update)


def state_of(opt_state: PyTree) -> AverageState | None:
    """The averages in an optimizer's state; None if it keeps none."""

    def is_average(node: Any) -> bool:
        return isinstance(node, AverageState)

    found = [x for x in jax.tree.leaves(opt_state, is_leaf=is_average) if is_average(x)]
    return found[0] if found else None


def averaged(state: TrainState) -> TrainState | None:
    """The state with the averages in place of its parameters; None if it keeps none. Parameters
    that are frozen are their own average."""
    found = state_of(state.opt_state)
    if found is None:
        return None

    def is_masked(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    def leaf(average: Any, p: jax.Array) -> jax.Array:
        return p if is_masked(average) else average.astype(p.dtype)

    return state.replace(params=jax.tree.map(leaf, found.params, state.params, is_leaf=is_masked))
