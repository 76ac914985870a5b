"""How fast a run's data is loaded: stage by stage on one core, as a whole, and for its model."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from clipx.data import pictures
from clipx.data.loader import CHUNK, Loader
from clipx.errors import BadSample, DataError
from clipx.planning import measure
from clipx.training import feed
from clipx.training.alone import after_photometry
from clipx.training.run import OpenRun, assemble

_TIMED = 256  # rows of a batch that are timed, at most


class Stage(NamedTuple):
    name: str
    cpu: float | None  # seconds of one core for one example; None where a device does the work
    wall: float  # seconds for one example, with what was waited for


def stages(loader: Loader, rows: int) -> list[Stage]:
    """What each stage of `loader` costs on one thread, over some rows of its source; the last is
    `Loader.load` as a run calls it. Rows that cannot be used are left out.

    JPEGs that are much larger than their crops cost the feed less than `decode`: it decodes those
    at a half, a quarter or an eighth."""
    examples, found = [], []
    count = len(loader.source)
    chosen = np.linspace(0, count - 1, min(rows, count)).astype(int).tolist()

    def read():
        for row in chosen:
            with contextlib.suppress(BadSample):
                examples.append(loader.source[row])

    def decode():
        for example in examples:
            with contextlib.suppress(BadSample):
                pictures.header(example)
                found.append(example._replace(image=pictures.decode(example)))

    def crop():
        for example, one in zip(found, draws):
            pictures.views(example, loader.crops, one, flips, out)

    def tokenise():
        for example in found:
            loader.tokenizer(example.texts[: len(loader.texts)])

    rng, views, side = np.random.default_rng(0), len(loader.crops), loader.image_size
    flips, out = (False,) * views, np.empty((views, side, side, 3), np.uint8)
    timed = [
        _timed("read", read, lambda: len(chosen)),
        _timed("decode", decode, lambda: len(found)),
    ]
    if not found:
        raise DataError("no row that was tried can be used; `verify` says why")
    draws = rng.random((len(found), views, pictures.TRIES, 4))
    steps = max(1, -(-len(found) // min(CHUNK, loader.schedule.batch_size)))
    chunk = np.arange(min(CHUNK, loader.schedule.batch_size))

    def load():
        for step in range(steps):
            loader.load(step, chunk)

    timed.append(_timed(f"crop, {views} view{'s' * (views > 1)}", crop, lambda: len(found)))
    timed.append(_timed("tokenise", tokenise, lambda: len(found)))
    timed.append(_timed("whole feed", load, lambda: steps * len(chunk)))
    return timed


def _timed(name: str, function: Callable[[], Any], count: Callable[[], int]) -> Stage:
    cpu, wall = time.thread_time(), time.perf_counter()
    function()
    cpu, wall = time.thread_time() - cpu, time.perf_counter() - wall
    return Stage(name, cpu / max(count(), 1), wall / max(count(), 1))


def sample_loader(run: OpenRun, data: feed.TrainingData) -> Loader:
    """What loads the first rows of each batch of the run: some hundred, to be timed."""
    return feed.loader(run, data, np.arange(min(run.batch_size, _TIMED)))


def run_stages(run: OpenRun, loader: Loader) -> list[Stage]:
    """`stages` of a run's `sample_loader`, with what a device does put before the whole feed: the
    transfer of the pictures and, if there is any, their photometry."""
    *host, whole = stages(loader, 2 * len(loader.positions))
    return [*host, *_device_stages(run, loader), whole]


def _device_stages(run: OpenRun, loader: Loader) -> Iterator[Stage]:
    pieces, count = loader.load(0, loader.positions), len(loader.positions)
    yield Stage("transfer", None, _median(lambda: jax.device_put(pieces["image"])) / count)
    policies = [view.photometry for view in run.objective.views.pictures]
    if any(p.jitter or p.grey or p.blur or p.solarise for p in policies):
        seconds = _median(lambda: list(after_photometry(run, pieces)))
        yield Stage("photometry, on the device", None, seconds / count)


def _median(function: Callable[[], Any], times: int = 5) -> float:
    """Seconds of a call, after one that does not count."""
    seconds = []
    for _ in range(times + 1):
        start = time.perf_counter()
        jax.block_until_ready(function())
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def model_rate(config: Mapping[str, Any]) -> tuple[float, int]:
    """(images a second that each process of the config's run takes, devices of the run): the
    training step itself, timed here."""
    whole = assemble({**config, "evals": {}, "train": {**config["train"], "best": ""}})
    seconds = statistics.median(measure.time_steps(whole, steps=5))
    return whole.batch_size / seconds / jax.process_count(), whole.mesh.devices.size


def table(stages: Sequence[Stage]) -> list[str]:
    """The stages as lines for a terminal."""
    lines = [f"{'ms a picture':26}{'one core':>10}{'wall':>10}{'images/s a core':>18}"]
    for stage in stages:
        cpu, rate = f"{'':10}", ""
        if stage.cpu is not None:
            cpu, rate = f"{stage.cpu * 1e3:10.3f}", f"{1 / max(stage.cpu, 1e-9):18,.0f}"
        lines.append(f"{stage.name:26}{cpu}{stage.wall * 1e3:10.3f}{rate}")
    return lines


def verdict(per_core: float, wanted: float | None, cores: int) -> str:
    """Whether `cores` that each feed `per_core` pictures a second are enough for a model that takes
    `wanted`."""
    if wanted is None:
        return (
            f"one core feeds {per_core:,.0f} images/s; --model times this model here, or "
            "--images_per_second=N says what it takes elsewhere"
        )
    needed = math.ceil(wanted / per_core)
    about = f"needs about {needed} core{'s' * (needed > 1)} for this model, and has {cores}"
    return f"input-bound: {about}" if needed > cores else f"not input-bound: {about}"


def rate(loader: Loader, steps: int) -> float:
    """Examples a second of `loader` with its workers, from its second batch on: the first waits for
    them to start."""
    with contextlib.closing(loader.batches(0, steps + 1)) as batches:
        next(batches)
        start = time.perf_counter()
        seen = sum(len(batch["row"]) for batch in batches)
        return seen / (time.perf_counter() - start)
