"""`python -m clipx.train --config=configs/clip.py --workdir=DIR`: trains, evaluates, saves, and
goes on where it stopped when started again."""

from __future__ import annotations

import collections
import pathlib
import time
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

from clipx import cli
from clipx.data import manifests
from clipx.data.base import Source, fingerprint
from clipx.data.quarantine import Quarantine
from clipx.data.text import tokenizers
from clipx.errors import ConfigError, RunError
from clipx.parallel import mesh as meshes
from clipx.parallel import processes
from clipx.reporting import page as report
from clipx.training import fit
from clipx.training.checkpoint import (
    Checkpoints,
    prepare_workdir,
    read_json,
    refuse_other_config,
    write_json,
)
from clipx.training.loop import Stop, Trainer, mesh_known
from clipx.training.metrics import Clock, Metrics
from clipx.training.run import Run, assemble
from clipx.training.survey import Survey


def describe(run: Run, digest: str) -> list[str]:
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
        manifests.describe(run.rows, digest, run.data.source, run.data.manifest),
        f"{steps:,} steps = {steps / run.steps_per_epoch:,.2f} epochs = {steps * batch:,} examples "
        f"at batch {batch:,}, {run.steps_per_epoch:,} steps an epoch",
    ]


def _tokenizer(run: Run, workdir: pathlib.Path, source: Source, resuming: bool):
    """The run's tokenizer, from the workdir when the run goes on. Process 0 makes it; the others
    read the file that it wrote."""
    path = workdir / "tokenizer.json"
    if not (resuming and path.exists()) and jax.process_index() == 0:
        write_json(path, run.open_tokenizer(source).save())
    if jax.process_count() > 1:
        processes.barrier("tokenizer")
    return tokenizers.load(read_json(path))


def _refuse_other_data(saved: dict[str, Any], rows: int, digest: str) -> None:
    """Raises `ConfigError` unless the data is what a checkpoint's run began with."""
    found, expected = f"{rows:,} rows", f"the {saved['rows']:,} rows that this run began with"
    if rows == saved["rows"]:
        found, expected = f"fingerprint {digest}", f"{saved['fingerprint']} as this run began with"
        if digest == saved["fingerprint"]:
            return
    raise ConfigError(
        "config.data",
        found,
        f"{expected}: their order is its own",
        "the same data, or another --workdir",
    )


def _too_large(found: fit.Needs) -> str:
    return (
        f"the step does not fit: {fit.describe_memory(found)}, {found.microbatches} "
        "micro-batch(es). config.train.microbatches=auto finds how many do"
    )


def _fitted(run: Run, saved: dict[str, Any] | None) -> Run:
    """The run with a number of micro-batches: that of its checkpoint on the same mesh, where the
    config says "auto"; on another mesh it is found again, and told."""
    if run.config.train.microbatches != "auto":
        return run
    main, before = jax.process_index() == 0, saved and saved["config"]["train"]["microbatches"]
    if saved and saved.get("mesh") == mesh_known(run):
        if main:
            print(f"train.microbatches=auto: {before}, as before", flush=True)
        return run.with_microbatches(before)

    def agreed(fits: bool) -> bool:
        if jax.process_count() == 1:
            return fits
        return bool(np.all(multihost_utils.process_allgather(np.array(fits))))

    def tell(found: fit.Needs) -> None:
        if main:
            print(f"  {found.microbatches}: {fit.describe_memory(found)}", flush=True)

    if main:
        print("train.microbatches=auto: compiling for the fewest that fit", flush=True)
    run = fit.fitted(run, agreed=agreed, tell=tell)
    if main:
        said = f" ({before} before, on another mesh)" if before else ""
        print(f"train.microbatches=auto: {run.microbatches}{said}", flush=True)
    return run


def _quarantine() -> str:
    """The file that this process names its bad rows in."""
    return f"quarantine{f'-{jax.process_index()}' if jax.process_count() > 1 else ''}.jsonl"


def train(config: dict[str, Any], workdir: str, devices=None) -> int:
    """Trains `config` in `workdir` on `devices` (default: all) and returns the exit code."""
    started = time.perf_counter()
    run = assemble(config, devices)
    folder = prepare_workdir(workdir)
    checkpoints = Checkpoints(folder, keep=run.config.train.keep, best=run.config.train.best)
    start = checkpoints.latest
    if start is not None:
        refuse_other_config(folder, run.complete)
    source, evaluators, teacher = run.open_source(), run.evaluators(), run.open_teacher()
    digest, saved = fingerprint(source), None
    if start is not None:
        saved = checkpoints.restore_run(start)
        _refuse_other_data(saved, len(source), digest)
    tokenizer = _tokenizer(run, folder, source, start is not None)
    run = run.with_data(len(source), tokenizer)
    run.loader(source, np.arange(0))  # says now what cannot be loaded, not after compiling
    main = jax.process_index() == 0
    if main:
        print("\n".join(describe(run, digest)), flush=True)
    run = _fitted(run, saved)
    if main:
        write_json(folder / "config.json", run.complete)
    if start is None:
        start, state, seconds = 0, run.init(), None
    else:
        state = checkpoints.restore(start, run.state)
        seconds = saved["seconds"]
        if main:
            print(f"going on from step {start:,} in {folder}", flush=True)
    predicted = None
    if start < run.steps:
        compiling = time.perf_counter()
        predicted = fit.measure(run)  # compiles, so that the first step's time is a step's
        if predicted.refused:
            raise RunError(_too_large(predicted))
        if main:
            print(f"compiled in {time.perf_counter() - compiling:.0f} s", flush=True)
            print(fit.describe(predicted), flush=True)
        processes.barrier("compiled")  # on CPUs the first collective waits 30 s for all, no more
    metrics = Metrics(
        folder,
        total_steps=run.steps,
        batch_size=run.batch_size,
        steps_per_epoch=run.steps_per_epoch,
        step=start,
        tensorboard=run.config.train.tensorboard,
    )
    with Stop() as stop, metrics:
        trainer = Trainer(
            run,
            folder,
            source,
            Survey(run, source, teacher),
            evaluators,
            checkpoints,
            metrics,
            Clock(seconds),
            Quarantine(folder / _quarantine()),
            digest,
            stop,
            predicted,
        )
        state, finished = trainer.train(state, start)
    checkpoints.close()
    if not finished:
        if main:
            print(f"told to stop; saved step {int(state.step):,}; start again to go on")
        return cli.EXIT_PREEMPTED
    try:
        report.write_run(folder, run, run.encode(state))
        page = "  report.html      open it in a browser"
    except RunError as error:  # the run itself is whole
        page = f"  no report.html: {error}"
    if main:
        for line in (
            f"done in {time.perf_counter() - started:.0f} s; in {folder}:",
            "  metrics.jsonl    a line for every logged step",
            "  config.json      the whole config, defaults included",
            "  checkpoints/     " + ", ".join(map(str, sorted(trainer.checkpoints.steps))),
            page,
        ):
            print(line)
        if (folder / _quarantine()).exists():
            print(f"  {_quarantine()} rows that could not be used, and why")
    return 0


def main(overrides: list[tuple[str, str]]) -> int:
    return train(cli.load_config(flags.FLAGS.config, overrides), flags.FLAGS.workdir)


if __name__ == "__main__":
    flags.DEFINE_string("config", None, "Config file, path.py or path.py:variant.")
    flags.DEFINE_string("workdir", None, "Folder of the run: new, or one to go on with.")
    cli.run(main, required=("config", "workdir"))
