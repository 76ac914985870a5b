"""The checkpoints of a workdir, through Orbax, and its JSON files."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from clipx.config import binding as configs
from clipx.errors import CheckpointError, ConfigError
from clipx.types import TrainState

# Keys that may change when a run is started again: where and how it computes, not what.
_FREE = (
    "config.mesh.",
    "config.data.workers",
    "config.data.path",
    "config.train.microbatches",
    "config.train.log_every_steps",
    "config.train.save_every_steps",
    "config.train.eval_every_steps",
    "config.train.keep",
    "config.train.best",
    "config.train.tensorboard",
    "config.evals",
)


def prepare_workdir(workdir: str | os.PathLike) -> pathlib.Path:
    """The absolute path of the workdir, created if it does not exist.

    Raises `ConfigError` for a folder that cannot be written.
    """
    path = pathlib.Path(workdir).expanduser().absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".write_test_{os.getpid()}"
        probe.write_bytes(b"clipx")
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            "--workdir", f"{path}: {error.strerror}", "a folder that can be written"
        ) from None
    return path


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes `value` as JSON, atomically: a reader never sees half a file."""
    aside = path.with_suffix(path.suffix + ".part")
    aside.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
    aside.replace(path)


def read_json(path: pathlib.Path) -> Any:
    """The JSON in a file of a workdir. Raises `ConfigError` if the file does not exist."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(
            "--workdir", f"no {path.name} in {path.parent}", "the workdir of a clipx run"
        ) from None


def refuse_other_config(workdir: pathlib.Path, complete: Mapping) -> None:
    """Raises `ConfigError` with a diff if the workdir's run has another config.

    The mesh, micro-batches, workers, logging and evals may differ, and keys that only the new
    config has.
    """
    old = read_json(workdir / "config.json")
    lines = [
        line
        for line in configs.difference(old, configs.to_lists(complete))
        if not line.startswith(_FREE) and ": '(absent)' -> " not in line
    ]
    if lines:
        raise ConfigError(
            "--workdir",
            f"{workdir} holds a run of another config (old -> new):\n    " + "\n    ".join(lines),
            "the run's own config, to continue from its last checkpoint",
            "use another --workdir for a new run, or the old values",
        )


class Checkpoints:
    """The checkpoints of one workdir, written asynchronously.

    keep: how many of the newest to keep. best: a metric; the checkpoint with its largest value is
    kept too. "" keeps none beside the newest.
    """

    def __init__(self, workdir: pathlib.Path, *, keep: int = 2, best: str = ""):
        self.folder = workdir / "checkpoints"
        keepers: list[policies.PreservationPolicy] = [policies.LatestN(keep)]
        if best:
            keepers.append(
                policies.BestN(
                    get_metric_fn=lambda metrics: metrics[best],
                    n=1,
                    keep_checkpoints_without_metrics=False,
                )
            )
        self._best = best
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(keepers),
                enable_async_checkpointing=True,
                cleanup_tmp_directories=True,
            ),
            item_names=("state", "run"),
        )

    @property
    def latest(self) -> int | None:
        """The newest step with a complete checkpoint; None if there is none."""
        return self._manager.latest_step()

    @property
    def steps(self) -> list[int]:
        """The steps of all checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def step(self, which: str | int = "latest") -> int:
        """The step that `latest`, `best` or a number names. Raises `ConfigError` if that checkpoint
        does not exist."""
        steps = self.steps
        if not steps:
            raise ConfigError(
                "--workdir", f"no checkpoint in {self.folder}", "a run that has saved a checkpoint"
            )
        chosen: str | int | None = which
        if which == "latest":
            chosen = steps[-1]
        elif which == "best":
            chosen = self._manager.best_step() if self._best else None
            if chosen is None:
                raise ConfigError(
                    "--step",
                    "best",
                    "a run whose config.train.best names a metric",
                    "--step=latest",
                )
        if int(chosen) not in steps:
            raise ConfigError("--step", str(which), f"one of {steps}, latest or best")
        return int(chosen)

    def save(
        self, step: int, state: TrainState, run: Mapping, metrics: Mapping[str, float]
    ) -> None:
        """Starts to write the checkpoint of `step`; does nothing if it is written already.

        run: JSON to write beside the arrays: config, tokenizer, clock. metrics: those of this very
        state. An error of this write, or of the one before it, raises `CheckpointError`.
        """
        if step == self.latest:
            return
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), run=ocp.args.JsonSave(dict(run))
                ),
                metrics=dict(metrics) if self._best in metrics else None,
            )
        except Exception as error:
            raise self._failed(step, error) from error

    def wait(self) -> None:
        """Waits until all started writes are done. Raises `CheckpointError` if one has failed."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._failed(None, error) from error

    def restore(self, step: int, state: TrainState) -> TrainState:
        """The state of `step`, sharded as the abstract `state` says, on any mesh.

        Raises `CheckpointError` if it cannot be read.
        """
        try:
            return self._manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(state))
            )["state"]
        except Exception as error:
            raise CheckpointError(
                f"cannot read checkpoint {step} in {self.folder}: {_line(error)}"
            ) from error

    def restore_run(self, step: int) -> dict[str, Any]:
        """The JSON `run` that `save` wrote with `step`."""
        return self._manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore()))[
            "run"
        ]

    def close(self) -> None:
        """Waits for started writes, and releases Orbax's threads."""
        self._manager.close()

    def _failed(self, step: int | None, error: Exception) -> CheckpointError:
        which = "a checkpoint" if step is None else f"the checkpoint of step {step}"
        last = max(_complete_steps(self.folder), default=None)
        safe = "no checkpoint was saved before" if last is None else f"step {last} is saved"
        return CheckpointError(f"cannot write {which} to {self.folder}: {_line(error)}; {safe}")


def _complete_steps(folder: pathlib.Path) -> list[int]:
    """The steps of the complete checkpoints: Orbax renames a folder when it is complete."""
    return [int(p.name) for p in folder.glob("*") if p.name.isdigit()]


def _line(error: BaseException) -> str:
    """The innermost cause of an error, in one line."""

    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split()) or type(error).__name__
    for reason in ("No space left on device", "RESOURCE_EXHAUSTED", "Permission denied"):
        if reason in text:
            return reason.replace("RESOURCE_EXHAUSTED", "out of space or memory")
    return text[:300]
