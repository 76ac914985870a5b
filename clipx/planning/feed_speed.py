"""Measures how fast a run's data is loaded, stage by stage and as a whole, and whether that is fast
enough for the run's model."""

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
from clipx.errors import BadSample, ConfigError, DataError
from clipx.planning import measure
from clipx.training import feed, stored
from clipx.training.alone import after_photometry
from clipx.training.run import OpenRun, assemble

_TIMED = 256  # at most so many rows of a batch are timed


class Stage(NamedTuple):
    """The cost of one stage, in seconds per example."""

    name: str
    cpu: float | None  # CPU time of one core; None if a device does the work
    wall: float  # elapsed time, waiting included


def stages(loader: Loader, rows: int) -> list[Stage]:
    """Measures each stage of `loader` on one thread, over at most `rows` rows of its source. The
    last stage is `Loader.load`, as a run calls it. Rows that cannot be used are left out.

    A run decodes JPEGs that are much larger than their crops at a half, a quarter or an eighth of
    their size, so it may spend less than the stage `decode` shows. Raises `DataError` if no row can
    be used.
    """
    examples, decoded = [], []
    count = len(loader.source)
    chosen = np.linspace(0, count - 1, min(rows, count)).astype(int).tolist()

    def read() -> None:
        for row in chosen:
            with contextlib.suppress(BadSample):
                examples.append(loader.source[row])

    def decode() -> None:
        for example in examples:
            with contextlib.suppress(BadSample):
                pictures.header(example, loader.source.limits)
                decoded.append(example._replace(image=pictures.decode(example)))

    def crop() -> None:
        for example, draw in zip(decoded, draws):
            data = loader.data
            pictures.views(example, loader.crops, draw, flips, out, data.limits, data.framing)

    def tokenise() -> None:
        for example in decoded:
            loader.tokenizer(example.texts[: len(loader.texts)])

    rng, views, side = np.random.default_rng(0), len(loader.crops), loader.image_size
    flips, out = (False,) * views, np.empty((views, side, side, 3), np.uint8)
    timed = [
        _timed("read", read, lambda: len(chosen)),
        _timed("decode", decode, lambda: len(decoded)),
    ]
    if not decoded:
        raise DataError(
            f"none of the {len(chosen)} rows that were tried can be used; "
            "python -m clipx.dataset verify says why"
        )
    draws = rng.random((len(decoded), views, pictures.TRIES, 4))
    steps = max(1, -(-len(decoded) // min(CHUNK, loader.schedule.batch_size)))
    chunk = np.arange(min(CHUNK, loader.schedule.batch_size))

    def load() -> None:
        for step in range(steps):
            loader.load(step, chunk)

    timed.append(_timed(f"crop, {views} view{'s' * (views > 1)}", crop, lambda: len(decoded)))
    timed.append(_timed("tokenise", tokenise, lambda: len(decoded)))
    timed.append(_timed("whole feed", load, lambda: steps * len(chunk)))
    return timed


def _timed(name: str, function: Callable[[], Any], count: Callable[[], int]) -> Stage:
    """The time of one call of `function`, divided by `count()` after it."""
    cpu, wall = time.thread_time(), time.perf_counter()
    function()
    cpu, wall = time.thread_time() - cpu, time.perf_counter() - wall
    return Stage(name, cpu / max(count(), 1), wall / max(count(), 1))


def sample_loader(run: OpenRun, data: feed.TrainingData) -> Loader:
    """A loader of the first rows, at most 256, of each of the run's batches. Raises `ConfigError`
    for a run that reads stored features, not the pictures or captions that would be timed."""
    for name in stored.towers(run.objective, run.data):
        where = stored.setting(run.objective, run.data, name)
        found = f"stored features of the {name} tower, which are not decoded"
        raise ConfigError(where, found, "pictures and captions to time", f"leave {where} out")
    return feed.loader(run, data, np.arange(min(run.batch_size, _TIMED)))


def run_stages(run: OpenRun, loader: Loader) -> list[Stage]:
    """`stages` of a run's `sample_loader`, with the device's stages inserted before the last one:
    the transfer of the images and, if the objective has any, their photometry."""
    *host, complete = stages(loader, 2 * len(loader.positions))
    return [*host, *_device_stages(run, loader), complete]


def _device_stages(run: OpenRun, loader: Loader) -> Iterator[Stage]:
    pieces, count = loader.load(0, loader.positions), len(loader.positions)
    yield Stage("transfer", None, _median(lambda: jax.device_put(pieces["image"])) / count)
    if any(view.photometry.on_device for view in run.objective.views.pictures):
        seconds = _median(lambda: list(after_photometry(run, pieces)))
        yield Stage("photometry, on the device", None, seconds / count)


def _median(function: Callable[[], Any], times: int = 5) -> float:
    """Median seconds of `times` calls, after one call to warm up."""
    seconds = []
    for _ in range(times + 1):
        start = time.perf_counter()
        jax.block_until_ready(function())
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def model_rate(config: Mapping[str, Any]) -> tuple[float, int]:
    """Times the run's training step on the devices of this machine. Returns (images per second
    that each process consumes, number of devices)."""
    run = assemble({**config, "evals": {}, "train": {**config["train"], "best": ""}})
    seconds = statistics.median(measure.time_steps(run, steps=5))
    return run.batch_size / seconds / jax.process_count(), run.mesh.devices.size


def table(stages: Sequence[Stage]) -> list[str]:
    """The stages as the lines of a table, for a terminal."""
    lines = [f"{'ms a picture':26}{'one core':>10}{'wall':>10}{'images/s a core':>18}"]
    for stage in stages:
        cpu, rate = f"{'':10}", ""
        if stage.cpu is not None:
            cpu, rate = f"{stage.cpu * 1e3:10.3f}", f"{1 / max(stage.cpu, 1e-9):18,.0f}"
        lines.append(f"{stage.name:26}{cpu}{stage.wall * 1e3:10.3f}{rate}")
    return lines


def verdict(per_core: float, wanted: float | None, cores: int) -> str:
    """Says whether `cores`, each of which loads `per_core` images per second, are enough for a
    model that consumes `wanted` images per second. Without `wanted`, how to state it."""
    if wanted is None:
        return (
            f"one core feeds {per_core:,.0f} images/s; to compare it with this model, use --model, "
            "which times the model here, or --images_per_second=N"
        )
    needed = math.ceil(wanted / per_core)
    about = f"needs about {needed} core{'s' * (needed > 1)} for this model, and has {cores}"
    return f"input-bound: {about}" if needed > cores else f"not input-bound: {about}"


def rate(loader: Loader, steps: int) -> float:
    """Examples per second of `loader` with its workers, over `steps` batches after the first, which
    waits for the workers to start."""
    generator = loader.batches(0, steps + 1)
    with contextlib.closing(generator) as batches:  # pyright: ignore[reportArgumentType]
        next(batches)
        start = time.perf_counter()
        seen = sum(len(batch["row"]) for batch in batches)
        return seen / (time.perf_counter() - start)
