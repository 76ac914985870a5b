"""`python -m clipx.train --config=configs/clip.py --workdir=DIR`: trains, evaluates, saves, and
goes on where it stopped when started again."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import pathlib
import signal
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

from clipx import cli, distributed, episodes, predict, report
from clipx import mesh as meshes
from clipx.checkpoint import (
    Checkpoints,
    prepare_workdir,
    read_json,
    refuse_other_config,
    write_json,
)
from clipx.cli import RunError
from clipx.config import ConfigError
from clipx.data import manifests, tokenizers
from clipx.data.base import DataError, Source, fingerprint
from clipx.data.quarantine import Quarantine
from clipx.encode import Interrupted
from clipx.evaluators.base import Evaluator, evaluate_all
from clipx.metrics import Clock, Metrics
from clipx.run import Run, assemble
from clipx.survey import Survey
from clipx.types import Batch, Features, TrainState

_AHEAD = 2  # steps that the host runs ahead of the devices


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


class Stop:
    """Whether the run was told to stop: SIGTERM or SIGINT, or, with several processes, JAX's word
    that one of them was, which all of them hear at one call: they all ask at the same places."""

    def __init__(self):
        self.asked = False
        self._calls = 0
        self._old = {}

    def __enter__(self) -> Stop:
        numbers = (signal.SIGINT, signal.SIGTERM) if jax.process_count() == 1 else ()
        with contextlib.suppress(ValueError):  # not in the main thread: no signals, then
            self._old = {n: signal.signal(n, self._ask) for n in numbers}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _ask(self, number, frame) -> None:
        self.asked = True
        signal.signal(number, self._old[number])  # a second one acts at once

    def __call__(self) -> bool:
        if jax.process_count() > 1 and not self.asked:
            self._calls += 1
            self.asked = multihost_utils.reached_preemption_sync_point(self._calls)
        return self.asked


@dataclasses.dataclass
class Trainer:
    """One run in one workdir, from its first step here to its last."""

    run: Run
    folder: pathlib.Path
    source: Source
    survey: Survey
    evaluators: dict[str, Evaluator]
    checkpoints: Checkpoints
    metrics: Metrics
    clock: Clock
    quarantine: Quarantine
    fingerprint: str
    stop: Stop
    predicted: predict.Prediction | None  # None: no step is left to take
    _skipped: list[tuple[int, list[tuple[int, str]]]] = dataclasses.field(default_factory=list)
    _read: int = 0
    _bad: int = 0
    _logged: int = 0

    def train(self, state: TrainState, start: int) -> tuple[TrainState, bool]:
        """The state after the last step, and whether it is that of the run's end.

        The order is evaluate, save, refresh, draw, step, log: what is saved is never behind what
        was drawn, and an episode that starts at a saved step starts again from there.
        """
        train, episode = self.run.config.train, self.run.objective.episode
        pending: collections.deque = collections.deque()
        self._logged = start
        with contextlib.ExitStack() as stack:
            feed = stack.enter_context(contextlib.closing(self.run.feed(self.source, start=start)))
            surveyed = stack.enter_context(contextlib.closing(self.survey.batches(start=start)))
            for step in range(start, self.run.steps + 1):
                last, stopping = step == self.run.steps, self.stop()
                evaluate = last or _due(step, train.eval_every_steps)
                save = last or (_due(step, train.save_every_steps) and step > start)
                refresh = episode is not None and step % episode == 0 and not last
                if stopping or evaluate or save or refresh:
                    self._drain(pending, 0)
                results: dict[str, float] | None = {}
                if evaluate and not stopping:
                    results = self._evaluate(state, step)
                    stopping, results = results is None, results or {}
                save = stopping or save or train.best in results
                if save:
                    self._save(state, step, results)
                if last or stopping:
                    break
                if refresh and (renewed := self._refresh(state, step, surveyed)) is None:
                    stopping = True
                    if not save:
                        self._save(state, step, results)
                    break
                state = renewed if refresh else state
                with self.clock.time("data"):
                    batch, known = next(feed)
                self._watch(step, known)
                with jax.transfer_guard("disallow"):
                    state, metrics = self.run.train_step(state, batch)
                pending.append((step + 1, list(zip(known["row"], known["key"])), metrics))
                self._drain(pending, _AHEAD)
        with self.clock.time("save"):
            self.checkpoints.wait()
        return state, last and not stopping

    def _refresh(self, state: TrainState, step: int, batches: Iterator[Batch]) -> TrainState | None:
        """The state with the memory of the episode that starts here; None if the run was told to
        stop meanwhile."""

        def batch() -> Batch:
            if self.stop():
                raise Interrupted
            return next(batches)

        started = time.perf_counter()
        with self.clock.time("episode"):
            try:
                state, features = jax.block_until_ready(self.survey.refresh(state, batch))
            except Interrupted:
                return None
            if self.run.config.train.episode_pictures:
                self._draw(state, features, step)
        seconds = time.perf_counter() - started
        spent = self.clock.total("episode")
        self.metrics.log(
            step, {"episode/seconds": seconds, "episode/share_of_time": spent / self.clock.total()}
        )
        return state

    def _draw(self, state: TrainState, features: Features, step: int) -> None:
        """Writes what the report shows of the episode that starts at `step`."""
        labels = jax.device_get(state.memory["labels"])
        places = episodes.sample(labels)
        features = jax.device_get(self.survey.gather(features, places))
        if jax.process_index() == 0:
            episodes.write(
                self.folder,
                int(state.memory["episode"]),
                rows=places,
                features=features,
                labels=labels,
                load=episodes.loading(self.run.loader(self.source, np.arange(0)), step),
            )

    def _drain(self, pending: collections.deque, keep: int) -> None:
        """Takes in the metrics of all but the newest `keep` steps: waits for them, logs those that
        are due, and stops the run if too many steps in a row were not finite."""
        train = self.run.config.train
        while len(pending) > keep:
            step, rows, metrics = pending.popleft()
            self.metrics.progress(step)
            metrics = jax.device_get(metrics)
            if metrics["skipped"]:
                self._skipped.append((step, rows))
                if len(self._skipped) >= train.max_skipped_steps:
                    raise RunError(self._not_finite())
            else:
                self._skipped.clear()
            if _due(step, train.log_every_steps) or step == self.run.steps:
                self._log(step, metrics)

    def _log(self, step: int, metrics: dict[str, Any]) -> None:
        steps, self._logged = step - self._logged, step
        speed = self.clock.interval(steps * self.run.batch_size)
        metrics = dict(metrics) | speed
        metrics["learning_rate"] = float(self.run.schedule(metrics["updates"] - 1))
        metrics["data/bad_fraction"] = self._bad / max(self._read, 1)
        metrics["step_seconds"] = self.run.batch_size / speed["images_per_second"]
        metrics |= predict.predicted(self.predicted) | predict.measured(
            self.run.mesh.local_devices[0], self.predicted, metrics["step_seconds"]
        )
        self.metrics.log(step, metrics)

    def _evaluate(self, state: TrainState, step: int) -> dict[str, float] | None:
        """What every eval finds, logged; None if the run was told to stop meanwhile."""
        encode = self.run.encode(state, interrupted=self.stop)
        with self.clock.time("evaluate"):
            try:
                results = evaluate_all(self.evaluators, encode)
            except Interrupted:
                return None
            except DataError:
                self._keep(state, step)
                raise
        self.metrics.log(step, results)
        best = self.run.config.train.best
        if best and best not in results:
            self._keep(state, step)
            raise ConfigError(
                "config.train.best", repr(best), "one of " + ", ".join(sorted(results))
            )
        return results

    def _keep(self, state: TrainState, step: int) -> None:
        """Saves before an evaluation's error ends the run: the steps so far are not at fault."""
        self._save(state, step, {})
        self.checkpoints.wait()

    def _save(self, state: TrainState, step: int, results: dict[str, float]) -> None:
        """Starts to save `state`, with what was found of that very state."""
        with self.clock.time("save"):
            extra = {
                "config": self.run.complete,
                "tokenizer": self.run.tokenizer.save(),
                "rows": self.run.rows,
                "fingerprint": self.fingerprint,
                "seconds": self.clock.totals,
                "mesh": _mesh(self.run),
            }
            self.checkpoints.save(step, state, extra, results)

    def _watch(self, step: int, known: dict[str, Any]) -> None:
        """Counts the rows that could not be used, names them, and stops the run at too many."""
        self._read += len(known["row"])
        for bad in filter(None, known["bad"].tolist()):
            self._bad += 1
            try:
                reasons = self.quarantine.add(step, bad)
            except OSError as error:
                raise RunError(f"{error.filename}: cannot be written ({error.strerror})") from None
            for reason in reasons:
                self.metrics.say(f"bad row, another stands in: {reason}")
        limit = self.run.data.max_bad_fraction
        if self._bad > limit * max(self._read, 10_000):
            raise RunError(
                f"{self._bad} of {self._read} rows could not be used, more than "
                f"config.data.max_bad_fraction={limit}; quarantine.jsonl names them"
            )

    def _not_finite(self) -> str:
        lines = [
            f"{len(self._skipped)} steps in a row had a loss or gradient that is not finite "
            "(config.train.max_skipped_steps); no parameter was changed by them. Their rows:"
        ]
        for step, rows in self._skipped:
            names = ", ".join(f"{row} ({key})" for row, key in rows[:4])
            lines.append(f"  step {step}: {names}, ... ({len(rows)} rows)")
        lines.append(f"The last checkpoint is that of step {self.checkpoints.latest}.")
        return "\n".join(lines)


def _due(step: int, every: int | None) -> bool:
    return every is not None and step > 0 and step % every == 0


def _tokenizer(run: Run, workdir: pathlib.Path, source: Source, resuming: bool):
    """The run's tokenizer, from the workdir when the run goes on. Process 0 makes it; the others
    read the file that it wrote."""
    path = workdir / "tokenizer.json"
    if not (resuming and path.exists()) and jax.process_index() == 0:
        write_json(path, run.open_tokenizer(source).save())
    if jax.process_count() > 1:
        distributed.barrier("tokenizer")
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


def _too_large(found: predict.Prediction) -> str:
    return (
        f"the step does not fit: {predict.describe_memory(found)}, {found.microbatches} "
        "micro-batch(es). config.train.microbatches=auto finds how many do"
    )


def _mesh(run: Run) -> dict[str, Any]:
    """What `train.microbatches=auto` was resolved for."""
    return {"axes": dict(run.mesh.shape), "device": run.mesh.devices.flat[0].device_kind}


def _fitted(run: Run, saved: dict[str, Any] | None) -> Run:
    """The run with a number of micro-batches: that of its checkpoint on the same mesh, where the
    config says "auto"; on another mesh it is found again, and told."""
    if run.config.train.microbatches != "auto":
        return run
    main, before = jax.process_index() == 0, saved and saved["config"]["train"]["microbatches"]
    if saved and saved.get("mesh") == _mesh(run):
        if main:
            print(f"train.microbatches=auto: {before}, as before", flush=True)
        return run.with_microbatches(before)

    def agreed(fits: bool) -> bool:
        if jax.process_count() == 1:
            return fits
        return bool(np.all(multihost_utils.process_allgather(np.array(fits))))

    def tell(found: predict.Prediction) -> None:
        if main:
            print(f"  {found.microbatches}: {predict.describe_memory(found)}", flush=True)

    if main:
        print("train.microbatches=auto: compiling for the fewest that fit", flush=True)
    run = predict.fitted(run, agreed=agreed, tell=tell)
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
        predicted = predict.predict(run)  # compiles, so that the first step's time is a step's
        if predicted.refused:
            raise RunError(_too_large(predicted))
        if main:
            print(f"compiled in {time.perf_counter() - compiling:.0f} s", flush=True)
            print("\n".join(predict.short(predicted)), flush=True)
        distributed.barrier("compiled")  # on CPUs the first collective waits 30 s for all, no more
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
