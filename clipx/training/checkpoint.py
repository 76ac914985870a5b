"""The checkpoints of a workdir, through Orbax: written in the background, proven, and read only if
nothing speaks against them."""

from __future__ import annotations

import functools
import json
import pathlib
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from clipx.config import secrets
from clipx.errors import CheckpointError, ConfigError, cause
from clipx.parallel import processes
from clipx.training import proof
from clipx.training.checkpoint_reader import fault, say
from clipx.training.metrics import FILE as LOG
from clipx.training.scores import Scores
from clipx.training.workdir import set_aside
from clipx.types import TrainState

_SECONDS = 1200.0  # for one write; past it the storage hangs


class Checkpoints:
    """The checkpoints of one workdir, written asynchronously. Reading them changes no file.

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
        self._keep = keep
        self._scores = Scores(workdir, best, evals or {})
        self._last: int | None = None  # the step that was saved or restored last
        self._proving: threading.Thread | None = None
        self._failure: BaseException | None = None  # of the write in the background

    @functools.cached_property
    def _manager(self) -> Any:
        """Writes, and deletes what is not kept: `orbax_files.Manager`."""
        from clipx.training import orbax_files

        return orbax_files.Manager(self.folder, self._keep, self._scores)

    @property
    def latest(self) -> int | None:
        """The newest step with a complete checkpoint; None if there is none."""
        return max(self.steps, default=None)

    @property
    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, ascending."""
        # Orbax renames a folder when it is complete.
        names = (p.name for p in self.folder.glob("[0-9]*"))
        return sorted(int(name) for name in names if name.isdecimal() and str(int(name)) == name)

    def _at(self, step: int) -> pathlib.Path:
        return self.folder / str(step)

    def newest_proven(self, before: int | None = None) -> int | None:
        """The newest step (of those `before`) whose checkpoint is what was saved; None if no
        checkpoint was saved.

        Damaged checkpoints are renamed to `<step>.damaged`, and one line tells which, why, and how
        many steps are done again. The arrays of checkpoints older than the one that is taken are
        not read. Raises `CheckpointError` if all that were saved are damaged. All processes must
        call it together.
        """
        self.wait()
        steps = self._agreed_steps()
        if before is not None:
            steps = [step for step in steps if step < before]
        if not steps:
            if before is None and (aside := self._set_aside()):
                raise CheckpointError(
                    f"no checkpoint is left in {self.folder}, only damaged ones: "
                    f"{', '.join(aside)}; remove them to start again from step 0"
                )
            return None
        chosen, faults = None, {}
        for step in reversed(steps):
            if why := fault(self._at(step), whole=chosen is None):
                faults[step] = why
            elif chosen is None:
                chosen = step
        if not faults:
            return chosen
        said = f"{self.folder}: {_listed(faults)}; renamed to {', '.join(self._rename(faults))}"
        if chosen is None and before is None:
            raise CheckpointError(f"{said}; no checkpoint is left to go on from")
        if chosen is not None and (again := max(steps) - chosen):
            said += f". Step {chosen} is taken: {again} steps are done again"
        say(said)
        return chosen

    def step(self, which: str | int = "latest") -> int:
        """The step that `latest`, `best` or a number names. "" is the best if the run keeps one,
        else the latest.

        Where `latest` or "" names a damaged checkpoint, a line says so and the next one is taken.
        Also prints a line if the best that is left is not the best that the run had. Raises
        `ConfigError` if that checkpoint does not exist, and `CheckpointError` for a damaged one
        that was named, and if all are damaged.
        """
        if not self.steps:
            aside = self._set_aside()
            raise ConfigError(
                "--workdir",
                f"no checkpoint in {self.folder}"
                + f", only damaged ones: {', '.join(aside)}" * bool(aside),
                "a run that has saved a checkpoint",
            )
        steps, faults = self._agreed_steps(), {}
        if which in ("", "best") and self._scores.name:  # reads the metrics of all
            faults = {step: why for step in steps if (why := fault(self._at(step), whole=False))}
        while left := [step for step in steps if step not in faults]:
            chosen = self._named(which, left)
            if why := fault(self._at(chosen), whole=True):
                faults[chosen] = why
                if which not in ("", "latest"):
                    raise CheckpointError(f"{self.folder}: {_listed(faults)}")
                continue
            if faults:
                say(f"{self.folder}: {_listed(faults)}. Step {chosen} is taken.")
            return chosen
        raise CheckpointError(f"{self.folder}: {_listed(faults)}; no checkpoint is left")

    def _named(self, which: str | int, steps: list[int]) -> int:
        """The one of `steps` that `which` names."""
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
        from clipx.training import orbax_files

        scores, listed = self._scores, ", ".join(map(str, steps))
        best = scores.best({step: orbax_files.read_metrics(self._at(step)) for step in steps})
        if best is None:
            missing = f"no checkpoint with a value of {scores.name}, which config.train.best names"
            if required:
                expected = f"a checkpoint that was evaluated; the steps here are {listed}"
                raise ConfigError("--step", f"best, but {missing}", expected, "--step=latest")
            say(f"{self.folder}: {missing}. The latest, step {steps[-1]}, is taken.")
            return steps[-1]
        step, value = best
        logged = scores.logged()
        if logged and logged[0] not in steps and scores.better(logged[1], value):
            say(
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
        if step == self._last:
            return
        self.wait()
        try:
            written = self._manager.save(step, state, secrets.cut_all(run), metrics)
        except Exception as error:
            raise self._failed(step, error) from error
        if not written:
            raise CheckpointError(
                f"cannot write the checkpoint of step {step} to {self.folder}, which already holds "
                f"step {self.latest}"
            )
        self._last, log = step, self.folder.parent / LOG
        logged = log.stat().st_size if log.is_file() else 0
        self._proving = threading.Thread(target=self._prove, args=(step, logged), name="proof")
        self._proving.start()

    def _prove(self, step: int, logged: int) -> None:
        """Waits until the checkpoint of `step` is complete, and writes this process's proof. Before
        that process 0 copies the first `logged` bytes of metrics.jsonl into it."""
        try:
            self._manager.wait()
            process, count = jax.process_index(), jax.process_count()
            if logged and process == 0:
                copy = self._at(step) / LOG
                with open(self.folder.parent / LOG, "rb") as log:
                    copy.with_suffix(".part").write_bytes(log.read(logged))
                copy.with_suffix(".part").replace(copy)
            proof.write(self._at(step), process=process, processes=count)
        except BaseException as error:
            self._failure = error

    def wait(self, seconds: float = _SECONDS) -> None:
        """Waits until the started write is done and proven. Raises `CheckpointError` if it has
        failed, or takes longer than `seconds`."""
        if self._proving is None:
            return
        self._proving.join(seconds)
        if self._proving.is_alive():
            raise self._failed(self._last, TimeoutError(f"it is not written after {seconds:g} s"))
        self._proving = None
        if self._failure is not None:
            error, self._failure = self._failure, None
            step, self._last = self._last, None
            raise self._failed(step, error) from error

    def restore(self, step: int, state: TrainState) -> TrainState:
        """The state of `step`, sharded as the abstract `state` says, on any mesh.

        Raises `CheckpointError` if it cannot be read, or is the state of another step.
        """
        from clipx.training import orbax_files

        restored = orbax_files.read_state(self._at(step), state)
        if int(restored.step) != step:
            raise CheckpointError(
                f"checkpoint {step} in {self.folder} holds the state of step {int(restored.step)}"
            )
        self._last = step
        return restored

    def restore_run(self, step: int) -> dict[str, Any]:
        """The JSON `run` that `save` wrote with `step`. Raises `CheckpointError` if it cannot be
        read."""
        from clipx.training import orbax_files

        return orbax_files.read_run(self._at(step))

    def close(self, seconds: float = _SECONDS) -> None:
        """Waits for the started write, and releases Orbax's threads. Raises as `wait` does."""
        failed = None
        try:
            self.wait(seconds)
        except CheckpointError as error:
            failed = error
        if "_manager" in self.__dict__ and self._proving is None:  # else it still writes
            manager = self.__dict__.pop("_manager")
            try:
                manager.close()
            except Exception as error:
                failed = failed or self._failed(self._last, error)
        if failed is not None:
            raise failed

    def _agreed_steps(self) -> list[int]:
        """The steps that process 0 sees."""
        return json.loads(processes.gather("steps", json.dumps(self.steps))[0])

    def _set_aside(self) -> list[str]:
        """The names of the checkpoints that were set aside."""
        return sorted(p.name for p in self.folder.glob("[0-9]*.damaged*"))

    def _rename(self, faults: Mapping[int, str]) -> list[str]:
        """Sets damaged checkpoints aside, and returns their new names, which Orbax passes over."""
        renamed = []
        for step, why in faults.items() if jax.process_index() == 0 else ():
            try:
                renamed.append(set_aside(self._at(step)))
            except OSError as error:
                raise CheckpointError(
                    f"checkpoint {step} in {self.folder} is damaged ({why}) and cannot be renamed "
                    f"to {step}.damaged: {error.strerror}"
                ) from None
        names = json.loads(processes.gather("renamed", json.dumps(renamed))[0])
        if "_manager" in self.__dict__:
            self._manager.reload()
        return names

    def _failed(self, step: int | None, error: BaseException) -> CheckpointError:
        which = "a checkpoint" if step is None else f"the checkpoint of step {step}"
        last = self.latest
        safe = "no checkpoint was saved before" if last is None else f"step {last} is saved"
        return CheckpointError(f"cannot write {which} to {self.folder}: {cause(error)}; {safe}")


def _listed(faults: Mapping[int, str]) -> str:
    return ", ".join(f"checkpoint {step} is damaged ({why})" for step, why in faults.items())
