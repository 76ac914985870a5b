"""The loop: a run's steps, with what is evaluated, saved, refreshed and logged between them."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from clipx.data.quarantine import Quarantine
from clipx.errors import ConfigError, DataError, Interrupted, RunError
from clipx.evaluators.base import Evaluator, evaluate_all
from clipx.training import episodes, fit
from clipx.training.checkpoint import Checkpoints
from clipx.training.clock import Clock
from clipx.training.feed import TrainingData, feed, loader
from clipx.training.metrics import Metrics
from clipx.training.run import OpenRun
from clipx.training.stop import Stop
from clipx.training.survey import Survey
from clipx.types import Batch, Features, TrainState

_AHEAD = 2  # steps that the host runs ahead of the devices


@dataclasses.dataclass
class Trainer:
    """One run in one workdir, from its first step here to its last."""

    run: OpenRun
    data: TrainingData
    folder: pathlib.Path
    evaluators: dict[str, Evaluator]
    checkpoints: Checkpoints
    metrics: Metrics
    clock: Clock
    quarantine: Quarantine
    stop: Stop
    needs: fit.Needs | None  # None: no step is left to take
    _skipped: list[tuple[int, list[tuple[int, str]]]] = dataclasses.field(default_factory=list)
    _read: int = 0
    _bad: int = 0
    _logged: int = 0

    @functools.cached_property
    def survey(self) -> Survey:
        return Survey(self.run, self.data)

    def train(self, state: TrainState, start: int) -> tuple[TrainState, bool]:
        """The state after the last step, and whether it is that of the run's end.

        The order is evaluate, save, refresh, draw, step, log: what is saved is never behind what
        was drawn, and an episode that starts at a saved step starts again from there.
        """
        train, episode = self.run.config.train, self.run.objective.episode_steps
        pending: collections.deque = collections.deque()
        self._logged = start
        with contextlib.ExitStack() as stack:
            batches = stack.enter_context(
                contextlib.closing(feed(self.run, self.data, start=start))
            )
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
                    batch, known = next(batches)
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
                load=episodes.loading(loader(self.run, self.data, np.arange(0)), step),
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
        metrics |= fit.logged(self.needs) | fit.measured(
            self.run.mesh.local_devices[0], self.needs, metrics["step_seconds"]
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
                "fingerprint": self.data.fingerprint,
                "seconds": self.clock.totals,
                "mesh": fit.mesh_known(self.run),
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
