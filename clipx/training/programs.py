"""Jitted functions that this process has made before: a run that goes on, and another of the same
config, share what was traced and compiled."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import json
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import jax
import numpy as np

from clipx.config import binding
from clipx.objectives.base import Objective
from clipx.parallel import mesh as meshes
from clipx.parallel.mesh import Mesh
from clipx.training.optimizer import OptimizerConfig
from clipx.types import Batch, Metrics, PyTree, TrainState

T = TypeVar("T")

_MOST = 16  # kept: those that were asked for last
_made: collections.OrderedDict[Hashable, Any] = collections.OrderedDict()


def kept(key: Hashable, make: Callable[[], T]) -> T:
    """What `make` returned when this process last called it for `key`, or returns now."""
    if key not in _made:
        _made[key] = make()
    _made.move_to_end(key)
    while len(_made) > _MOST:
        _made.popitem(last=False)
    return _made[key]


def compiling(lowered: jax.stages.Lowered) -> concurrent.futures.Future[jax.stages.Compiled]:
    """The compiled program, once it is. XLA compiles in a thread and does not hold Python's lock,
    so that this thread goes on. One of several processes compiles at once: all need one order."""
    if jax.process_count() > 1:
        done: concurrent.futures.Future[jax.stages.Compiled] = concurrent.futures.Future()
        done.set_result(lowered.compile())
        return done
    pool = concurrent.futures.ThreadPoolExecutor(1, "compile")
    try:
        return pool.submit(lowered.compile)
    finally:
        pool.shutdown(wait=False)


def key(
    objective: Objective, optimizer: OptimizerConfig, mesh: Mesh, arrays: PyTree, *numbers: Hashable
) -> Hashable:
    """Equal for runs with the same programs. arrays: the abstract arrays that these take."""
    leaves, tree = jax.tree.flatten(arrays)
    shapes = tuple((x.shape, x.dtype, x.sharding) for x in leaves)
    methods = (type(objective).embed, type(objective).loss)
    section = json.dumps(binding.dump(optimizer))
    return objective, methods, section, mesh, tree, shapes, numbers


@dataclasses.dataclass(frozen=True)
class Step:
    """A compiled training step, for one run: (state, batch) -> (state, metrics). A call donates the
    state."""

    compiled: jax.stages.Compiled
    lengths: jax.Array  # of the run's schedule

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        return self.compiled(state, batch, self.lengths)


def traced(
    step: Callable[..., tuple[TrainState, Metrics]],
    state: TrainState,
    batch: Batch,
    lengths: np.ndarray,
    mesh: Mesh,
) -> jax.stages.Traced:
    """A training step, traced for a mesh. The state is donated and keeps its shardings; metrics are
    replicated. lengths: of a schedule; only their shape matters."""
    everywhere = meshes.replicated(mesh)
    shardings = jax.tree.map(lambda x: x.sharding, state), everywhere
    numbers = jax.ShapeDtypeStruct(lengths.shape, lengths.dtype, sharding=everywhere)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=shardings)
    with jax.set_mesh(mesh):
        return jitted.trace(state, batch, numbers)
