"""A session: a run in its workdir, from its config to its last step, or to where it was stopped."""

from __future__ import annotations

import collections
import dataclasses
import pathlib
import time
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from clipx.data import manifests
from clipx.data.quarantine import Quarantine
from clipx.data.text import tokenizers
from clipx.errors import ConfigError, RunError
from clipx.evaluators.base import Evaluator
from clipx.parallel import mesh as meshes
from clipx.parallel import processes
from clipx.training import fit
from clipx.training.checkpoint import (
    Checkpoints,
    prepare_workdir,
    read_json,
    refuse_other_config,
    write_json,
)
from clipx.training.clock import Clock
from clipx.training.feed import TrainingData, loader, open_data
from clipx.training.initial import init, open_tokenizer
from clipx.training.loop import Trainer
from clipx.training.metrics import Metrics
from clipx.training.run import OpenRun, Run, assemble, with_data
from clipx.training.stop import Stop
from clipx.types import TrainState


@dataclasses.dataclass(frozen=True)
class Session:
    """A run over its data, in a workdir that is new or holds its checkpoints."""

    run: OpenRun
    data: TrainingData
    evaluators: dict[str, Evaluator]
    folder: pathlib.Path
    checkpoints: Checkpoints
    saved: dict[str, Any] | None  # the JSON of the checkpoint that it goes on from; None: a new run

    def train(self, stop: Stop | None = None) -> tuple[TrainState, bool]:
        """The state after the last step, and whether it is that of the run's end: else the run was
        told to stop, and has saved. `stop`: who says so; None: signals.

        Raises `RunError` for a step that does not fit its devices."""
        state, seconds = self._start()
        needs = self._compile() if int(state.step) < self.run.steps else None
        metrics = Metrics(
            self.folder,
            total_steps=self.run.steps,
            batch_size=self.run.batch_size,
            steps_per_epoch=self.run.steps_per_epoch,
            step=int(state.step),
            tensorboard=self.run.config.train.tensorboard,
        )
        with stop or Stop() as stop, metrics:
            trainer = Trainer(
                run=self.run,
                data=self.data,
                folder=self.folder,
                evaluators=self.evaluators,
                checkpoints=self.checkpoints,
                metrics=metrics,
                clock=Clock(seconds),
                quarantine=Quarantine(quarantine_file(self.folder)),
                stop=stop,
                needs=needs,
            )
            state, finished = trainer.train(state, int(state.step))
        self.checkpoints.close()
        return state, finished

    def _start(self) -> tuple[TrainState, dict[str, float] | None]:
        """The state that training starts from, and the seconds that the run has taken so far."""
        if self.saved is None:
            return init(self.run), None
        step = self.checkpoints.latest
        state = self.checkpoints.restore(step, self.run.state)
        tell(f"going on from step {step:,} in {self.folder}")
        return state, self.saved["seconds"]

    def _compile(self) -> fit.Needs:
        """What the step needs, compiled now, so that the first step's time is a step's."""
        started = time.perf_counter()
        needs = fit.measure(self.run)
        if needs.refused:
            raise RunError(
                f"the step does not fit: {fit.describe_memory(needs)}, {needs.microbatches} "
                "micro-batch(es). config.train.microbatches=auto finds how many do"
            )
        tell(f"compiled in {time.perf_counter() - started:.0f} s")
        tell(fit.describe(needs))
        processes.barrier("compiled")  # on CPUs the first collective waits 30 s for all, no more
        return needs


def open_session(config: dict[str, Any], workdir: str, devices=None) -> Session:
    """The session of `config` in `workdir`, on `devices` (default: all). Everything is opened and
    said, and nothing is compiled but what `train.microbatches=auto` tries.

    Raises `ConfigError` for a config that cannot be, and for a workdir with a run of another config
    or of other data.
    """
    run = assemble(config, devices)
    folder = prepare_workdir(workdir)
    checkpoints = Checkpoints(folder, keep=run.config.train.keep, best=run.config.train.best)
    start, saved = checkpoints.latest, None
    if start is not None:
        refuse_other_config(folder, run.complete)
        saved = checkpoints.restore_run(start)
    data, evaluators = open_data(run), run.evaluators()
    if saved is not None:
        _refuse_other_data(saved, len(data), data.fingerprint)
    opened = with_data(run, len(data), _tokenizer(run, data, folder, resuming=saved is not None))
    loader(opened, data, np.arange(0))  # says now what cannot be loaded, not after compiling
    tell("\n".join(describe(opened, data.fingerprint)))
    opened = resolve_microbatches(opened, saved)
    if jax.process_index() == 0:
        write_json(folder / "config.json", opened.complete)
    return Session(opened, data, evaluators, folder, checkpoints, saved)


def tell(text: str) -> None:
    """Prints for the user, once for all processes."""
    if jax.process_index() == 0:
        print(text, flush=True)


def quarantine_file(folder: pathlib.Path) -> pathlib.Path:
    """The file in which this process names the rows that could not be used."""
    own = f"-{jax.process_index()}" if jax.process_count() > 1 else ""
    return folder / f"quarantine{own}.jsonl"


def describe(run: OpenRun, fingerprint: str) -> list[str]:
    """What is about to happen, in the units people think in."""
    batch, steps = run.batch_size, run.steps
    parameters = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(run.state.params))
    devices = collections.Counter(d.device_kind for d in run.mesh.devices.flat)
    kinds = ", ".join(f"{count} x {kind}" for kind, count in devices.items())
    axes = ", ".join(f"{name} {size}" for name, size in run.mesh.shape.items())
    return [
        f"{run.complete['objective']['name']}: {parameters:,} parameters on {kinds} ({axes}), "
        f"{jax.process_count()} process(es)",
        *meshes.describe_whole(run.mesh, run.state.params),
        manifests.describe(run.rows, fingerprint, run.data.source, run.data.manifest),
        f"{steps:,} steps = {steps / run.steps_per_epoch:,.2f} epochs = {steps * batch:,} examples "
        f"at batch {batch:,}, {run.steps_per_epoch:,} steps an epoch",
    ]


def _tokenizer(
    run: Run, data: TrainingData, folder: pathlib.Path, *, resuming: bool
) -> tokenizers.Tokenizer:
    """The run's tokenizer, from the workdir when the run goes on. Process 0 makes it; the others
    read the file that it wrote."""
    path = folder / "tokenizer.json"
    if not (resuming and path.exists()) and jax.process_index() == 0:
        write_json(path, open_tokenizer(run, data.source).save())
    if jax.process_count() > 1:
        processes.barrier("tokenizer")
    return tokenizers.load(read_json(path))


def _refuse_other_data(saved: dict[str, Any], rows: int, fingerprint: str) -> None:
    """Raises `ConfigError` unless the data is what a checkpoint's run began with."""
    found, expected = f"{rows:,} rows", f"the {saved['rows']:,} rows that this run began with"
    if rows == saved["rows"]:
        if fingerprint == saved["fingerprint"]:
            return
        found = f"fingerprint {fingerprint}"
        expected = f"{saved['fingerprint']} as this run began with"
    raise ConfigError(
        "config.data",
        found,
        f"{expected}: their order is its own",
        "the same data, or another --workdir",
    )


def resolve_microbatches(run: OpenRun, saved: dict[str, Any] | None) -> OpenRun:
    """The run with a number of micro-batches: that of its checkpoint on the same mesh, where the
    config says "auto"; on another mesh it is found again, and told."""
    if run.config.train.microbatches != "auto":
        return run
    before = saved and saved["config"]["train"]["microbatches"]
    if saved and saved.get("mesh") == fit.mesh_known(run):
        tell(f"train.microbatches=auto: {before}, as before")
        return run.with_microbatches(before)

    def agreed(fits: bool) -> bool:
        if jax.process_count() == 1:
            return fits
        return bool(np.all(multihost_utils.process_allgather(np.array(fits))))

    tell("train.microbatches=auto: compiling for the fewest that fit")
    run = fit.fitted(
        run,
        agreed=agreed,
        tell=lambda found: tell(f"  {found.microbatches}: {fit.describe_memory(found)}"),
    )
    said = f" ({before} before, on another mesh)" if before else ""
    tell(f"train.microbatches=auto: {run.microbatches}{said}")
    return run
