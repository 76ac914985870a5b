"""What Orbax writes and reads of a checkpoint. Orbax takes a fifth of the time of `import
clipx.train`, so this file is imported where a checkpoint is written or read."""

from __future__ import annotations

import functools
import math
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from clipx.errors import CheckpointError, cause
from clipx.training.scores import Scores
from clipx.types import PyTree, TrainState

# Orbax reads the wall clock, which may jump: its own limits must never be reached. The one for
# folders that are made in the background cannot be set.
_NEVER = 100 * 365 * 86_400


class _KeepBest(policies.PreservationPolicy):
    """Keeps the checkpoint with the best value of a metric."""

    def __init__(self, scores: Scores):
        self._scores = scores

    def should_preserve(
        self,
        checkpoints: Sequence[Any],  # `PolicyCheckpointInfo`, which Orbax does not export
        *,
        context: policies.PreservationContext,
    ) -> Sequence[bool]:
        best = self._scores.best({c.step: c.metrics for c in checkpoints})
        return [best is not None and c.step == best[0] for c in checkpoints]


class Manager:
    """Writes the checkpoints of a folder in the background, and deletes what is not kept.

    keep: how many of the newest to keep. The best by `scores` is kept too, if these have a name.
    """

    def __init__(self, folder: pathlib.Path, keep: int, scores: Scores):
        best = scores.name
        keepers: list[policies.PreservationPolicy] = [policies.LatestN(keep)]
        if best:
            keepers.append(_KeepBest(scores))
        self._manager = ocp.CheckpointManager(
            folder,
            options=ocp.CheckpointManagerOptions(
                # Orbax stores metrics only if it has a `best_fn`. What is kept, the policy says.
                best_fn=lambda metrics: metrics.get(best, math.nan),
                preservation_policy=policies.AnyPreservationPolicy(keepers),
                enable_async_checkpointing=True,
                async_options=ocp.options.AsyncOptions(
                    timeout_secs=_NEVER, create_directories_asynchronously=False
                ),
                cleanup_tmp_directories=True,
            ),
            item_names=("state", "run"),
        )
        self.wait = self._manager.wait_until_finished
        self.reload, self.close = self._manager.reload, self._manager.close

    def save(
        self, step: int, state: TrainState, run: Mapping[str, Any], metrics: Mapping[str, float]
    ) -> bool:
        """Starts to write; returns False if the folder holds this step or a later one."""
        drop_late_reports()
        items = {"state": ocp.args.StandardSave(state), "run": ocp.args.JsonSave(dict(run))}
        return self._manager.save(
            step, args=ocp.args.Composite(**items), metrics=dict(metrics) or None
        )


@functools.cache  # once in a process
def drop_late_reports() -> None:
    """Lets Python print no traceback for reads and writes that end after another one has failed:
    they report to Orbax's event loop, which is closed by then."""
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = hook


def _read(folder: pathlib.Path, **item: ocp.args.CheckpointArgs) -> Any:
    """One item of the checkpoint in `folder`. Raises `CheckpointError` if it cannot be read."""
    (name,) = item
    drop_late_reports()
    try:
        reader = ocp.Checkpointer(ocp.CompositeCheckpointHandler())
        return reader.restore(folder, args=ocp.args.Composite(**item))[name]
    except Exception as error:
        raise CheckpointError(
            f"cannot read checkpoint {folder.name} in {folder.parent}: {cause(error)}"
        ) from error


def read_state(folder: pathlib.Path, state: TrainState) -> TrainState:
    """The state of the checkpoint in `folder`, sharded as the abstract `state` says. Raises
    `CheckpointError` if it cannot be read."""
    return _read(folder, state=ocp.args.StandardRestore(state))


def read_run(folder: pathlib.Path) -> Any:
    """The JSON that was saved beside the state. Raises `CheckpointError` if it cannot be read."""
    return _read(folder, run=ocp.args.JsonRestore())


def read_metrics(folder: pathlib.Path) -> dict[str, float] | None:
    """The metrics of the state; None if the checkpoint stores none. Raises Orbax's errors."""
    try:
        handler = ocp.JsonCheckpointHandler(filename="metrics")
        return dict(handler.restore(epath.Path(folder) / "metrics"))
    except FileNotFoundError:
        return None


def read_arrays(folder: pathlib.Path) -> PyTree:
    """All arrays of the state, on the host, whatever their tree is. Raises Orbax's errors."""
    drop_late_reports()
    reader, path = ocp.PyTreeCheckpointHandler(), epath.Path(folder) / "state"
    tree = reader.metadata(path).tree
    plain = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    return reader.restore(path, args=ocp.args.PyTreeRestore(restore_args=plain))
