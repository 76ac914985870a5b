"""The training loop: a run's steps, and the evaluations, checkpoints, refreshes and log lines
between them."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import json
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from clipx.data.quarantine import Quarantine
from clipx.errors import ConfigError, DataError, Interrupted, RunError
from clipx.evaluators.base import Evaluator
from clipx.training import episodes, finite, fit
from clipx.training.average import SUFFIX, averaged
from clipx.training.checkpoint import Checkpoints
from clipx.training.clock import Clock
from clipx.training.feed import TrainingData, feed, loader, quarantine_file
from clipx.training.metric_table import RENAMED
from clipx.training.metrics import Metrics
from clipx.training.patience import Patience
from clipx.training.rollback import NotFinite, Rollback, Skipped
from clipx.training.run import OpenRun
from clipx.training.shown import evaluated
from clipx.training.stop import Stop
from clipx.training.survey import Survey
from clipx.training.watch import Watch
from clipx.types import Batch, Features, TrainState

_AHEAD = 2  # steps that the host runs ahead of the devices
_WINDOW = 5 * _AHEAD  # steps, at least, over which the speed is measured

# steps whose metrics are not fetched yet: (step, [(row id, key), ...], metrics)
Pending = collections.deque[tuple[int, list[tuple[int, str]], dict[str, jax.Array]]]


@dataclasses.dataclass
class Trainer:
    """Trains one run in one workdir, from the step of a given state on."""

    run: OpenRun
    data: TrainingData
    folder: pathlib.Path
    evaluators: dict[str, Evaluator]
    checkpoints: Checkpoints
    metrics: Metrics
    clock: Clock
    quarantine: Quarantine
    stop: Stop
    needs: fit.Needs | None  # of the compiled step; None if no step is left
    rollback: Rollback
    patience: Patience
    _skipped: Skipped = dataclasses.field(default_factory=list)  # the last steps in a row
    _read: int = 0  # rows loaded
    _bad: int = 0  # rows that could not be used
    _logged: int = 0  # the last logged step

    @functools.cached_property
    def survey(self) -> Survey:
        return Survey(self.run, self.data)

    @functools.cached_property
    def _watch(self) -> Watch:
        return Watch.of(self.run)

    @functools.cached_property
    def _term_chances(self) -> dict[str, float]:
        return self.run.objective.term_chances(self.run.batch_size)

    def train(self, state: TrainState, start: int) -> tuple[TrainState, bool]:
        """(the last state, whether the run is finished). If not finished, it was asked to stop.

        Both cases have saved the state. Raises `RunError` if the run cannot go on.
        """
        if self.run.config.train.rollback and self.checkpoints.latest is None:
            self._save(state, start, {})  # something to go back to
        while True:
            try:
                return self._train(state, start)
            except NotFinite:
                state, start = self._go_back()

    def _train(self, state: TrainState, start: int) -> tuple[TrainState, bool]:
        """`train`, until too many steps in a row are not finite: raises `NotFinite` then.

        The order at each step is evaluate, save, refresh, load a batch, step, log. So a checkpoint
        is never behind the batches that were loaded, and an episode that starts at a saved step
        starts again after a resume.
        """
        train, episode = self.run.config.train, self.run.objective.episode_steps
        pending: Pending = collections.deque()
        self._logged, last, stopping, over = start, False, False, ""
        with contextlib.ExitStack() as stack:
            batches = stack.enter_context(
                contextlib.closing(feed(self.run, self.data, start=start))
            )
            surveyed = stack.enter_context(contextlib.closing(self.survey.batches(start=start)))
            for step in range(start, self.run.steps + 1):
                last, asked = step == self.run.steps, self.stop()
                evaluate = last or _due(step, train.eval_every_steps)
                save = last or (_due(step, train.save_every_steps) and step > start)
                refresh = episode is not None and step % episode == 0 and not last
                if asked or evaluate or save or refresh:
                    self._drain(pending, 0)
                # with `rollback`, no checkpoint may stand between steps that are not finite
                stopping = asked and not (self._skipped and train.rollback and not last)
                results: dict[str, float] | None = {}
                if evaluate and not asked:
                    with self._saved_first(state, step, start, pending):
                        results = self._evaluate(state, step)
                    stopping, results = results is None, results or {}
                    over = "" if last or stopping else self.patience.over(step, results)
                must = last or stopping or bool(over)
                save = self._may_save(step, save or train.best in results, must)
                if save:
                    self._save(state, step, results)
                if over:
                    self.metrics.say(over)
                if must:
                    break
                if refresh:
                    with self._saved_first(state, step, start, pending):
                        renewed = self._refresh(state, step, surveyed)
                    if renewed is None:
                        stopping = True
                        if not save and self._may_save(step, True, not train.rollback):
                            self._save(state, step, results)
                        break
                    state = renewed
                with self.clock.time("data"), self._saved_first(state, step, start, pending):
                    batch, host = next(batches)
                self._count_bad(step, host)
                with jax.transfer_guard("disallow"):
                    state, metrics = self.run.train_step(state, batch)
                pending.append((step + 1, list(zip(host["row"], host["key"])), metrics))
                self._drain(pending, _AHEAD if step > start else 0)  # the first is shown at once
        with self.clock.time("save"):
            self.checkpoints.wait()
        return state, (last or bool(over)) and not stopping

    def _may_save(self, step: int, due: bool, must: bool) -> bool:
        """Whether a checkpoint is written. One that is only `due` is not, between steps that are
        not finite: their cause may be the state."""
        if (due or must) and self._skipped:
            how = "saved, though" if must else "not saved:"
            count = len(self._skipped)
            self.metrics.say(f"step {step:,} is {how} the last {count} step(s) were not finite")
        return must or (due and not self._skipped)

    def _go_back(self) -> tuple[TrainState, int]:
        """(state, step) of the last checkpoint, from which the run goes on without the rows of the
        last steps. Raises `RunError` without `train.rollback`, and if that would not help."""
        skipped, self._skipped = self._skipped, []
        back = self.checkpoints.newest_proven()
        if not self.run.config.train.rollback or back is None:
            raise RunError(self._not_finite(skipped))
        self.rollback = self.rollback.after(skipped, back, self.run.rows)
        self.data = dataclasses.replace(self.data, left_out=self.rollback.left_out)
        for name in ("survey", "_watch"):  # made anew, for other rows
            self.__dict__.pop(name, None)
        for step, rows in skipped:
            reason = f"left out: the loss or gradient of step {step} was not finite"
            self._quarantine(step, [{"row": int(r), "key": k, "reason": reason} for r, k in rows])
        self.metrics.back(back)
        self.metrics.say(
            f"steps {skipped[0][0]:,} to {skipped[-1][0]:,} were not finite: going back to step "
            f"{back:,}, and on without their rows ({len(self.rollback.left_out):,} left out so "
            f"far, which {quarantine_file(self.folder).name} names)"
        )
        return self.checkpoints.restore(back, self.run.state), back

    def _refresh(self, state: TrainState, step: int, batches: Iterator[Batch]) -> TrainState | None:
        """The state with the memory of the episode that starts at `step`; None if the run is asked
        to stop meanwhile."""

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
                self._write_episode(state, features, step)
        seconds = time.perf_counter() - started
        spent = self.clock.total("episode")
        self.metrics.log(
            step, {"episode/seconds": seconds, "episode/share_of_time": spent / self.clock.total()}
        )
        return state

    def _write_episode(self, state: TrainState, features: Features, step: int) -> None:
        """Writes the file from which the report shows the episode that starts at `step`."""
        labels = jax.device_get(state.memory["labels"])
        places = episodes.sample(labels)
        sampled = jax.device_get(self.survey.gather(features, places))
        if jax.process_index() == 0:
            episodes.write(
                self.folder,
                int(state.memory["episode"]),
                rows=places,
                features=sampled,
                labels=labels,
                load=episodes.loading(loader(self.run, self.data, np.arange(0)), step),
            )

    def _drain(self, pending: Pending, keep: int) -> None:
        """Waits for the metrics of all but the newest `keep` pending steps, and logs those that are
        due. Raises `NotFinite` if too many steps in a row were not finite."""
        train = self.run.config.train
        while len(pending) > keep:
            step, rows, metrics = pending.popleft()
            self.metrics.progress(step)
            metrics = jax.device_get(metrics)
            if metrics["skipped"]:
                self._skipped.append((step, rows))
                if len(self._skipped) >= train.max_skipped_steps:
                    raise NotFinite
            else:
                self._skipped.clear()
            if _due(step, train.log_every_steps) or step == self.run.steps:
                self._log(step, metrics)

    def _log(self, step: int, metrics: dict[str, Any]) -> None:
        steps, self._logged = step - self._logged, step
        batch = self.run.batch_size
        speed = self.clock.interval(steps * batch, _WINDOW * batch)
        metrics = {RENAMED.get(key, key): x for key, x in metrics.items()} | speed
        metrics |= {f"chance_{term}": x for term, x in self._term_chances.items()}
        metrics["data/bad_fraction"] = self._bad / max(self._read, 1)
        if self.rollback.left_out:
            metrics["data/left_out"] = len(self.rollback.left_out)
        metrics["step_seconds"] = batch / speed["images_per_second"]
        assert self.needs is not None  # a step has run
        metrics |= fit.logged(self.needs) | fit.measured(
            self.run.mesh.local_devices[0], self.needs, metrics["step_seconds"]
        )
        warnings = self._watch.look(step, metrics)
        self.metrics.log(step, metrics | {"warnings": self._watch.holding})
        for line in warnings:
            self.metrics.say(line)

    def _evaluate(self, state: TrainState, step: int) -> dict[str, float] | None:
        """Runs every eval, and logs and returns their metrics; None if the run is asked to stop
        meanwhile."""
        with self.clock.time("evaluate"):
            try:
                results = evaluated(self.evaluators, self.run.encode(state, interrupted=self.stop))
                if (mean := averaged(state)) is not None:  # beside the plain parameters
                    encode = self.run.encode(mean, interrupted=self.stop)
                    results |= evaluated(
                        {f"{k}{SUFFIX}": e for k, e in self.evaluators.items()}, encode
                    )
            except Interrupted:
                return None
        self.metrics.log(step, results)
        best = self.run.config.train.best
        if best and best not in results:
            raise ConfigError(
                "config.train.best", repr(best), "one of " + ", ".join(sorted(results))
            )
        return results

    @contextlib.contextmanager
    def _saved_first(
        self, state: TrainState, step: int, start: int, pending: Pending
    ) -> Iterator[None]:
        """Context in which an error of the data or of an evaluation does not lose the steps so far:
        they are saved before it goes on. Several processes cannot agree to, as only one may fail:
        their last checkpoint stands."""
        try:
            yield
        except (DataError, RunError, ConfigError):
            if jax.process_count() == 1 and step > start and self.checkpoints.latest != step:
                self._drain(pending, 0)
                if self._may_save(step, True, not self.run.config.train.rollback):
                    self._save(state, step, {})
                    self.checkpoints.wait()
                    self.metrics.say(f"saved step {step:,}, as the run cannot go on")
            raise

    def _save(self, state: TrainState, step: int, results: dict[str, float]) -> None:
        """Starts to save `state`; `results` are the evals' metrics of that state. Raises `RunError`
        for a state that is not finite."""
        with self.clock.time("save"):
            if names := finite.not_finite(state):
                self.checkpoints.wait()  # for a write that has started
                raise RunError(finite.refuse_save(names, step, self.checkpoints.latest))
            extra = {
                "config": self.run.complete,
                "tokenizer": self.run.tokenizer.save(),
                "rows": self.run.rows,
                "fingerprint": self.data.fingerprint,
                "seconds": self.clock.totals,
                "mesh": fit.mesh_known(self.run),
                **self.rollback.dump(),
            }
            self.checkpoints.save(step, state, extra, results)

    def _count_bad(self, step: int, host: dict[str, Any]) -> None:
        """Counts and reports the rows of a batch that could not be used. Raises `RunError` if there
        are more than `data.max_bad_fraction` allows."""
        self._read += len(host["row"])
        for bad in filter(None, host["bad"].tolist()):
            self._bad += 1
            for reason in self._quarantine(step, json.loads(bad)):
                self.metrics.say(f"bad row, replaced by another: {reason}")
        limit = self.run.data.max_bad_fraction
        if self._bad > limit * max(self._read, 10_000):
            raise RunError(
                f"{self._bad} of {self._read} rows could not be used, more than "
                f"config.data.max_bad_fraction={limit}; quarantine.jsonl names them"
            )

    def _quarantine(self, step: int, rows: list[dict[str, Any]]) -> list[str]:
        """Records rows in quarantine.jsonl; returns "key: reason" of each new one."""
        try:
            return self.quarantine.add(step, rows)
        except OSError as error:
            raise RunError(f"{error.filename}: cannot be written ({error.strerror})") from None

    def _not_finite(self, skipped: Skipped) -> str:
        """The message about steps that were not finite, with rows of each."""
        lines = [
            f"{len(skipped)} steps in a row had a loss or gradient that is not finite "
            "(config.train.max_skipped_steps). They changed no parameter. Their rows:"
        ]
        for step, rows in skipped:
            names = ", ".join(f"{row} ({key})" for row, key in rows[:4])
            lines.append(f"  step {step}: {names}, ... ({len(rows)} rows)")
        latest = self.checkpoints.latest
        lines.append("No checkpoint is saved." if latest is None else f"Step {latest} is saved.")
        return "\n".join(lines)


def _due(step: int, every: int | None) -> bool:
    return every is not None and step > 0 and step % every == 0
