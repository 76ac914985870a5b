"""The checkpoints of a workdir, through Orbax, and its JSON files."""

from __future__ import annotations

import json
import math
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from clipx.config import binding as configs
from clipx.errors import CheckpointError, ConfigError, damaged_file
from clipx.training import guesses, metric_table, metrics
from clipx.training.schema import Config
from clipx.types import Metric, TrainState

# Keys that may change when a run is started again: where and how it computes, not what.
_FREE = (
    "config.mesh.",
    "config.data.workers",
    "config.data.timeout",
    "config.data.path",
    "config.train.microbatches",
    "config.train.log_every_steps",
    "config.train.save_every_steps",
    "config.train.eval_every_steps",
    "config.train.keep",
    "config.train.best",
    "config.train.tensorboard",
    "config.train.rollback",
    "config.evals",
)
# folders that may lie elsewhere, but not be left out or named anew: what they hold is checked
_FOLDERS = ("config.data.features.image", "config.data.features.text")


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
    """The JSON in a file of a workdir. Raises `ConfigError` if it is missing or damaged."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(
            "--workdir", f"no {path.name} in {path.parent}", "the workdir of a clipx run"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise damaged_file(path, error) from None


def read_config(workdir: pathlib.Path) -> dict[str, Any]:
    """The config.json of a workdir. Raises `ConfigError` for a file that is missing or damaged."""
    path = workdir / "config.json"
    config = read_json(path)
    try:
        configs.check(Config, config)
    except ConfigError as error:
        error.file = str(path)
        raise
    return config


def refuse_other_config(workdir: pathlib.Path, complete: Mapping) -> None:
    """Raises `ConfigError` with a diff if the workdir's run has another config.

    The mesh, micro-batches, workers, logging and evals may differ, and keys that only the new
    config has. A setting that is left open has the value that the run guessed.
    """
    old = read_json(workdir / "config.json")
    complete = guesses.fill(complete, guesses.read(workdir))
    lines = [
        line
        for line in configs.difference(old, complete)
        if not line.startswith(_FREE)
        and ": '(absent)' -> " not in line
        and not (line.startswith(_FOLDERS) and "None" not in line)
    ]
    if lines:
        raise ConfigError(
            "--workdir",
            f"{workdir} holds a run of another config (old -> new):\n    " + "\n    ".join(lines),
            "the run's own config, to continue from its last checkpoint",
            "use another --workdir for a new run, or the old values",
        )


class Scores:
    """The values of one metric at the steps of a run.

    A checkpoint stores the metrics of its state. Where it stores none, as those of clipx 0.1, the
    line of metrics.jsonl with the same step tells.
    """

    def __init__(self, workdir: pathlib.Path, name: str, evals: Mapping[str, Any]):
        self.name = name
        self._metric = metric_table.metric(name, evals) if name else Metric()
        rows = metrics.read(workdir) if name else []
        self._logged = {row["step"]: row[name] for row in rows if _finite(row.get(name))}

    def best(self, stored: Mapping[int, Mapping[str, float] | None]) -> tuple[int, float] | None:
        """The best (step, value) of checkpoints; None if none has a finite value.

        stored: the metrics that each checkpoint stores, by its step.
        """
        values = {step: (kept or {}).get(self.name) for step, kept in stored.items()}
        points = [
            (step, self._logged.get(step) if value is None else value)
            for step, value in sorted(values.items())
        ]
        return self._best([(step, value) for step, value in points if _finite(value)])

    def logged(self) -> tuple[int, float] | None:
        """The best (step, value) of metrics.jsonl, with a checkpoint or without."""
        return self._best(sorted(self._logged.items()))

    def _best(self, points: Sequence[tuple[int, Any]]) -> tuple[int, float] | None:
        return metric_table.best(self._metric, points) if points else None

    def better(self, value: float, other: float) -> bool:
        """Whether `value` is better than `other`."""
        return value < other if self._metric.better == "less" else value > other


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


class Checkpoints:
    """The checkpoints of one workdir, written asynchronously.

    keep: how many of the newest to keep. best: a metric; the checkpoint with its best value is kept
    too. "" keeps none beside the newest. evals: the config's section, whose evaluators declare
    whether more or less of the metric is better.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        *,
        keep: int = 2,
        best: str = "",
        evals: Mapping[str, Any] | None = None,
    ):
        self.folder = workdir / "checkpoints"
        self._scores = Scores(workdir, best, evals or {})
        keepers: list[policies.PreservationPolicy] = [policies.LatestN(keep)]
        if best:
            keepers.append(_KeepBest(self._scores))
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                # Orbax stores metrics only if it has a `best_fn`. What is kept, the policy says.
                best_fn=lambda metrics: metrics.get(best, math.nan),
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
        """The step that `latest`, `best` or a number names. "" is the best if the run keeps one,
        else the latest.

        Prints a line if the best that is left is not the best that the run had. Raises
        `ConfigError` if that checkpoint does not exist.
        """
        steps = self.steps
        if not steps:
            raise ConfigError(
                "--workdir", f"no checkpoint in {self.folder}", "a run that has saved a checkpoint"
            )
        if which in ("", "best") and self._scores.name:
            return self._best(steps, required=which == "best")
        if which == "best":
            raise ConfigError(
                "--step", "best", "a run whose config.train.best names a metric", "--step=latest"
            )
        chosen = steps[-1] if which in ("", "latest") else which
        if not str(chosen).isdecimal() or int(chosen) not in steps:
            raise ConfigError("--step", str(which), f"one of {steps}, latest or best")
        return int(chosen)

    def _best(self, steps: Sequence[int], *, required: bool) -> int:
        """The step of `steps` with the best value. Without any value: a `ConfigError` if it is
        `required`, else the latest step."""
        scores, listed = self._scores, ", ".join(map(str, steps))
        best = scores.best({step: self._manager.metrics(step) for step in steps})
        if best is None:
            missing = f"no checkpoint with a value of {scores.name}, which config.train.best names"
            if required:
                expected = f"a checkpoint that was evaluated; the steps here are {listed}"
                raise ConfigError("--step", f"best, but {missing}", expected, "--step=latest")
            _say(f"{self.folder}: {missing}. The latest, step {steps[-1]}, is taken.")
            return steps[-1]
        step, value = best
        logged = scores.logged()
        if logged and logged[0] not in steps and scores.better(logged[1], value):
            _say(
                f"{self.folder}: {scores.name} was best at step {logged[0]} ({logged[1]:.4g}), "
                f"which has no checkpoint. Step {step} ({value:.4g}) is the best of {listed}."
            )
        return step

    def save(
        self, step: int, state: TrainState, run: Mapping, metrics: Mapping[str, float]
    ) -> None:
        """Starts to write the checkpoint of `step`; does nothing if it is written already.

        run: JSON to write beside the arrays: config, tokenizer, clock. metrics: those of this very
        state; {} for a state that was not evaluated. An error of this write, or of the one before
        it, raises `CheckpointError`.
        """
        if step == self.latest:
            return
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), run=ocp.args.JsonSave(dict(run))
                ),
                metrics=dict(metrics) or None,
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


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _say(line: str) -> None:
    """Prints a line on process 0, beside what a command prints as its result."""
    if jax.process_index() == 0:
        print(line, file=sys.stderr, flush=True)


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
