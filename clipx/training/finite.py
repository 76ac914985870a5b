"""Which arrays of a state are not finite: such a state is never saved."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from clipx.errors import listed
from clipx.parallel.mesh import path_name
from clipx.types import TrainState


# One small program for each shape: a program for all arrays together takes longer to compile.
@jax.jit
def _finite(x: jax.Array) -> jax.Array:
    return jnp.all(jnp.isfinite(x))


def not_finite(state: TrainState) -> list[str]:
    """The paths of the arrays of `state` that hold NaN or infinity, as `params/image/...` and
    `opt_state/...`. Checked on the devices; all processes must call it together."""
    return [
        path_name(path)
        for path, x in jax.tree.leaves_with_path(state)
        # one at a time: collectives of several programs at once can wait for each other for ever
        if jnp.issubdtype(x.dtype, jnp.inexact) and not bool(_finite(x))
    ]


def refuse_save(names: list[str], step: int, saved: int | None) -> str:
    """Why the state of `step` cannot be saved. saved: the newest step with a checkpoint."""
    kept = "no checkpoint is saved" if saved is None else f"step {saved:,} is saved and intact"
    return (
        f"the state of step {step:,} holds NaN or infinity in {listed(names, 4)}, so it is not "
        f"saved; {kept}. A smaller config.optimizer.learning_rate or weight_decay, or "
        "config.optimizer.clip_norm=1.0, keeps the updates finite"
    )


def refuse_start(names: list[str], step: int) -> str:
    """Why no run can start from the state of `step`."""
    return (
        f"the checkpoint of step {step:,} holds NaN or infinity in {listed(names, 4)}, so no step "
        f"can be taken from it. Move the folder checkpoints/{step} away, and the run goes on from "
        "the checkpoint before it"
    )
