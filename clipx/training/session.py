"""A session: a run in its workdir, from its config to its last step or until it is stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from clipx.data.base import Source
from clipx.data.loader import import_grain
from clipx.data.quarantine import Quarantine
from clipx.data.resolve import resolve
from clipx.data.text import tokenizers
from clipx.errors import CheckpointError, ConfigError, DataError, Interrupted, RunError
from clipx.evaluators.base import Evaluator
from clipx.parallel import processes
from clipx.training import (
    encoders,
    extension,
    finite,
    fit,
    guesses,
    kept_features,
    notes,
    recovery,
    stored,
    whitening,
)
from clipx.training.checkpoint import Checkpoints
from clipx.training.clock import Clock
from clipx.training.embedding import with_features
from clipx.training.feed import TrainingData, loader, open_data, quarantine_file
from clipx.training.initial import init, open_tokenizer
from clipx.training.loop import Trainer
from clipx.training.metrics import Metrics
from clipx.training.metrics import read as metric_lines
from clipx.training.patience import Patience
from clipx.training.rollback import Rollback
from clipx.training.run import OpenRun, Run, assemble, checked, with_data
from clipx.training.shown import working
from clipx.training.stop import Stop
from clipx.training.workdir import prepare_workdir, read_json, refuse_other_config, write_json
from clipx.types import Device, TrainState

_AFTER_ERROR = 60.0  # seconds that a run which ends with an error waits for a started write


@dataclasses.dataclass(frozen=True)
class Session:
    """A run with open data, in a workdir that is new or holds the run's checkpoints."""

    run: OpenRun
    data: TrainingData
    evaluators: dict[str, Evaluator]
    folder: pathlib.Path
    checkpoints: Checkpoints
    start: int | None  # the step of the checkpoint to continue from; None: a new run
    saved: dict[str, Any] | None  # the JSON of that checkpoint

    def train(self, stop: Stop | None = None) -> tuple[TrainState, bool]:
        """Trains to the end, or until it is asked to stop; the state is saved in both cases.

        Returns (the last state, whether the run is finished). stop: asked at every step; None
        listens to signals. Raises `RunError` for a step that does not fit the devices.
        """
        with self._saving():
            return self._train(stop)

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        """Waits for the started write, also after an error, which is then the one that is raised:
        Python cannot end cleanly while Orbax writes."""
        try:
            yield
        except BaseException:
            with contextlib.suppress(CheckpointError):
                self.checkpoints.close(_AFTER_ERROR)
            raise
        self.checkpoints.close()

    def _train(self, stop: Stop | None) -> tuple[TrainState, bool]:
        with working("making the first state" if self.start is None else "reading the checkpoint"):
            state, seconds = self._start()
        metrics = Metrics(
            self.folder,
            total_steps=self.run.steps,
            batch_size=self.run.batch_size,
            steps_per_epoch=self.run.steps_per_epoch,
            step=int(state.step),
            tensorboard=self.run.config.train.tensorboard,
            evals=self.run.complete["evals"],
            wandb=self.run.config.train.wandb,
            config=self.run.complete,
        )
        with stop or Stop() as stop, metrics:
            try:
                folder = self.folder / stored.FOLDER
                data = with_features(self.run, self.data, state, folder, stop=stop, tell=tell)
            except Interrupted:
                return state, False
            if self.saved is None:
                state = whitening.start(self.run, data, state, tell)
            needs = self._compile() if int(state.step) < self.run.steps else None
            rollback = Rollback.of(self.saved)
            trainer = Trainer(
                run=self.run,
                data=dataclasses.replace(data, left_out=rollback.left_out),
                folder=self.folder,
                evaluators=self.evaluators,
                checkpoints=self.checkpoints,
                metrics=metrics,
                clock=Clock(seconds),
                quarantine=Quarantine(quarantine_file(self.folder)),
                stop=stop,
                needs=needs,
                rollback=rollback,
                patience=self._patience(int(state.step)),
            )
            return trainer.train(state, int(state.step))

    def _patience(self, step: int) -> Patience:
        train, rows = self.run.config.train, metric_lines(self.folder)
        return Patience.of(train.best, train.patience, self.run.complete["evals"], rows, step)

    def _start(self) -> tuple[TrainState, dict[str, float] | None]:
        """(the state to start from, the run's `Clock.totals` so far)."""
        if self.saved is None or self.start is None:
            return init(self.run, tell, self._prepare), None
        self._prepare()
        state = self.checkpoints.restore(self.start, self.run.state)
        if names := finite.not_finite(state):
            raise RunError(finite.refuse_start(names, self.start))
        tell(f"continuing from step {self.start:,} in {self.folder}")
        return state, self.saved["seconds"]

    def _prepare(self) -> None:
        """Starts to compile the step, and imports what loads rows meanwhile. Several processes
        compile later: what they run together waits only 30 s for the slowest."""
        if jax.process_count() == 1 and (self.start or 0) < self.run.steps:
            self.run.start_compiling()
            import_grain()

    def _compile(self) -> fit.Needs:
        """Compiles the step before the first one, so that no step's time includes it."""
        started = time.perf_counter()
        with working("compiling"):
            needs = fit.measure(self.run)
        if needs.refused:
            raise RunError(
                f"the step does not fit the devices: {fit.describe_memory(needs)}, "
                f"{needs.microbatches} micro-batch(es). config.train.microbatches=auto finds the "
                "fewest micro-batches that fit"
            )
        tell(f"compiled in {time.perf_counter() - started:.0f} s")
        tell(fit.describe(needs))
        processes.barrier("compiled")  # on CPUs the first collective waits only 30 s for the others
        return needs


def open_session(
    config: dict[str, Any],
    workdir: str,
    devices: Sequence[Device] | None = None,
    *,
    extend: bool = False,
) -> Session:
    """The session of `config` in `workdir`, on `devices` (default: all). extend: a run of the
    workdir may become longer, with another schedule from its last checkpoint on.

    Opens the data, prints what the run will do and what was guessed, and writes config.json,
    guesses.json and tokenizer.json. Compiles only what `train.microbatches=auto` tries. Raises
    `ConfigError` for a wrong config, and for a workdir with a run of another config, other data or
    other guesses.
    """
    config = resolved(config, workdir, devices)
    run = assemble(config, devices)
    folder = prepare_workdir(workdir)
    train, evals = run.config.train, run.complete["evals"]
    checkpoints = Checkpoints(folder, keep=train.keep, best=train.best, evals=evals)
    start, saved = checkpoints.newest_proven(), None
    if start is not None:
        saved = checkpoints.restore_run(start)
        recovery.mend(folder, start, saved)
    if (longer := extension.applied(config, run.complete, folder, start, extend=extend)) != config:
        run = assemble(longer, devices)
    if start is not None:
        refuse_other_config(folder, run.complete)
    elif lines := len(metric_lines(folder)):
        tell(f"no checkpoint in {folder}: step 0 again; the {lines:,} line(s) of its metrics go")
    with working("opening the data"):
        data = open_data(run, look=True)
    evaluators = run.evaluators(data.held_out)
    sources = guesses.sources(data.source, evaluators)
    for where, source in sources.items():
        for line in guesses.lines(where, source):
            tell(line)
    for spec in run.evals:
        spec.look(evaluators[spec.name])
    run, guessed = _with_guesses(run, folder, sources, resuming=saved is not None)
    if saved is not None:
        _refuse_other_data(saved, len(data), data.fingerprint)
    tokenizer = _tokenizer(run, data, folder, resuming=saved is not None)
    run = dataclasses.replace(run, data=kept_features.keeping(run.objective, run.data, folder))
    opened = with_data(run, len(data), tokenizer, data.fingerprint)
    for name, features in data.features.items():
        stored.refuse_other(opened.objective, tokenizer, opened.data, name, features)
    loader(opened, data, np.arange(0))  # raises what is wrong now, not after compiling
    tell(
        "\n".join(
            [
                *notes.describe(opened, data.fingerprint),
                *notes.of_run(opened, new=saved is None),
                *data.notes,
                *stored.describe(data.features),
            ]
        )
    )
    for name, evaluator in evaluators.items():
        for note in evaluator.notes():
            tell(f"{name}: {note}")
    opened = resolve_microbatches(opened, saved)
    if jax.process_index() == 0:
        if guessed:
            write_json(folder / guesses.FILE, guesses.dump(guessed))
        else:
            (folder / guesses.FILE).unlink(missing_ok=True)  # of an earlier run without checkpoints
        write_json(folder / "config.json", opened.complete)
    return Session(opened, data, evaluators, folder, checkpoints, start, saved)


def tell(text: str) -> None:
    """Prints on process 0 only."""
    if jax.process_index() == 0:
        print(text, flush=True)


def resolved(
    config: Mapping[str, Any],
    workdir: str,
    devices: Sequence[Device] | None = None,
    say: Callable[[str], None] = tell,
) -> dict[str, Any]:
    """The config with the towers and sources that lie at its paths in place of `name=auto` and
    `source=auto`: those of the run in `workdir` if it holds one. What is wrong with the config
    itself is raised first."""
    folder = pathlib.Path(workdir).expanduser().absolute()
    begun = (folder / "config.json").exists() or Checkpoints(folder).steps
    saved = recovery.run_config(folder) if begun else None
    config = encoders.resolve(config, saved, say)
    checked(config, devices)
    try:
        return resolve(config, saved, say)
    except DataError:
        assemble(config, devices)
        raise


def _tokenizer(
    run: Run, data: TrainingData, folder: pathlib.Path, *, resuming: bool
) -> tokenizers.Tokenizer:
    """The run's tokenizer: the workdir's when resuming, else a new one that process 0 makes and
    writes to the workdir. All processes read that file."""
    path = folder / "tokenizer.json"
    if not resuming and jax.process_index() == 0:
        with working("making the tokenizer"):
            write_json(path, open_tokenizer(run, data.source).save())
    if jax.process_count() > 1:
        processes.barrier("tokenizer")
    return tokenizers.load(read_json(path))


def _with_guesses(
    run: Run, folder: pathlib.Path, sources: Mapping[str, Source], *, resuming: bool
) -> tuple[Run, guesses.Guesses]:
    """(the run with the guessed values in its config, these guesses and those of before). Raises
    `ConfigError` if a run that goes on would guess another value."""
    before = guesses.Guesses()
    if resuming:
        config = read_json(folder / "config.json")
        before = guesses.still(guesses.read(folder), run.complete, config)
    now = guesses.made(sources)
    guesses.refuse_other(run.complete, before, now)
    complete = guesses.put(guesses.fill(run.complete, before), now)
    return dataclasses.replace(run, complete=complete), before | now


def _refuse_other_data(saved: dict[str, Any], rows: int, fingerprint: str) -> None:
    """Raises `ConfigError` unless the data is that of the checkpoint's run."""
    found, expected = f"{rows:,} rows", f"the {saved['rows']:,} rows that this run started with"
    if rows == saved["rows"]:
        if fingerprint == saved["fingerprint"]:
            return
        found = f"data with fingerprint {fingerprint}"
        expected = f"fingerprint {saved['fingerprint']}, of the data that this run started with"
    raise ConfigError(
        "config.data",
        found,
        expected,
        "the same rows in the same order (a fingerprint is of the rows' keys, so tars and a table "
        "of the same pictures have two), or another --workdir for a new run",
    )


def resolve_microbatches(run: OpenRun, saved: dict[str, Any] | None) -> OpenRun:
    """The run, with a number in place of `train.microbatches=auto`.

    On the mesh of the checkpoint it is the checkpoint's number. On another mesh, and for a new run,
    `fit.fitted` finds it.
    """
    if run.config.train.microbatches != "auto":
        return run
    before = saved["config"]["train"]["microbatches"] if saved else None
    if before and saved and saved.get("mesh") == fit.mesh_known(run):
        tell(f"train.microbatches=auto: {before}, as before")
        return run.with_microbatches(before)

    def agreed(fits: bool) -> bool:
        """Whether the step fits on all processes."""
        if jax.process_count() == 1:
            return fits
        return bool(np.all(multihost_utils.process_allgather(np.array(fits))))

    tell("train.microbatches=auto: compiling, to find the fewest that fit")
    run = fit.fitted(
        run,
        agreed=agreed,
        tell=lambda needs: tell(f"  {needs.microbatches}: {fit.describe_memory(needs)}"),
    )
    change = f" ({before} before, on another mesh)" if before else ""
    tell(f"train.microbatches=auto: {run.microbatches}{change}")
    return run
