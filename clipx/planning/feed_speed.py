"""How fast a feed is: stage by stage on one core, as a whole, and beside a PyTorch DataLoader."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np

from clipx.data import pictures
from clipx.data.loader import Feed
from clipx.data.sources.table import Table
from clipx.data.text import tokenizers
from clipx.data.text.tokenizers import TokenizerConfig
from clipx.errors import BadSample, DataError

_CHUNK = 32  # rows that the feed loads together
_FILES = 256
SHORT, _LONG = 256, 341  # sides of the drawn pictures
_BATCH = 64  # of the two loaders
_ROUNDS = 5  # of the two loaders, one after the other; the medians count


class Stage(NamedTuple):
    name: str
    cpu: float | None  # seconds of one core for one example; None where a device does the work
    wall: float  # seconds for one example, with what was waited for


def stages(feed: Feed, rows: int) -> list[Stage]:
    """What each stage of `feed` costs on one thread, over some rows of its source; the last is
    `Feed.load` as a run calls it. Rows that cannot be used are left out.

    JPEGs that are much larger than their crops cost the feed less than `decode`: it decodes those
    at a half, a quarter or an eighth."""
    examples, found = [], []
    chosen = np.linspace(0, len(feed.source) - 1, min(rows, len(feed.source))).astype(int).tolist()

    def read():
        for row in chosen:
            with contextlib.suppress(BadSample):
                examples.append(feed.source[row])

    def decode():
        for example in examples:
            with contextlib.suppress(BadSample):
                pictures.header(example)
                found.append(example._replace(image=pictures.decode(example)))

    def crop():
        for example, one in zip(found, draws):
            pictures.views(example, feed.crops, one, flips, out)

    def tokenise():
        for example in found:
            feed.tokenizer(example.texts[: len(feed.texts)])

    rng, views, side = np.random.default_rng(0), len(feed.crops), feed.image_size
    flips, out = (False,) * views, np.empty((views, side, side, 3), np.uint8)
    timed = [
        _timed("read", read, lambda: len(chosen)),
        _timed("decode", decode, lambda: len(found)),
    ]
    if not found:
        raise DataError("no row that was tried can be used; `verify` says why")
    draws = rng.random((len(found), views, pictures.TRIES, 4))
    steps = max(1, -(-len(found) // min(_CHUNK, feed.batch)))
    chunk = np.arange(min(_CHUNK, feed.batch))

    def load():
        for step in range(steps):
            feed.load(step, chunk)

    timed.append(_timed(f"crop, {views} view{'s' * (views > 1)}", crop, lambda: len(found)))
    timed.append(_timed("tokenise", tokenise, lambda: len(found)))
    timed.append(_timed("whole feed", load, lambda: steps * len(chunk)))
    return timed


def _timed(name: str, function: Callable[[], Any], count: Callable[[], int]) -> Stage:
    cpu, wall = time.thread_time(), time.perf_counter()
    function()
    cpu, wall = time.thread_time() - cpu, time.perf_counter() - wall
    return Stage(name, cpu / max(count(), 1), wall / max(count(), 1))


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


def rate(feed: Feed, steps: int) -> float:
    """Examples a second of `feed` with its workers, from its second batch on: the first waits for
    them to start."""
    with contextlib.closing(feed.batches(0, steps + 1)) as batches:
        next(batches)
        start = time.perf_counter()
        seen = sum(len(batch["row"]) for batch in batches)
        return seen / (time.perf_counter() - start)


class Speed(NamedTuple):
    """Medians of the rounds."""

    per_core: float  # examples for each second of CPU time, of all processes together
    wall: float  # examples a second


class Comparison(NamedTuple):
    versions: str
    workers: int  # threads of clipx, processes of the other
    files: int  # drawn JPEGs
    kilobytes: float  # of one, on average
    rows: list[tuple[str, Speed, Speed, float]]  # what, clipx, other, median ratio per core


def against(script: pathlib.Path, *, passes: int = 1280, say=lambda text: None) -> Comparison:
    """`Feed` beside the loader of `script` over the same drawn pictures, with as many threads as
    the other has processes: one round of each after the other, five times.

    Raises `DataError` if the script is not there, or cannot run.
    """
    if not script.is_file():
        raise DataError(f"{script}: not there; --against=torch runs from a checkout of clipx")
    workers = min(pictures.cores(), 16)
    passes -= passes % _BATCH
    with tempfile.TemporaryDirectory(prefix="clipx-bench-") as folder:
        say(f"drawing {_FILES} pictures")
        kilobytes = draw(pathlib.Path(folder), _FILES) / 1000
        with _other(script, folder, passes, workers) as (versions, ask):
            rounds = []
            feeds = {"two": _feed(folder, ((0.2, 1.0),) * 2), "one": _feed(folder, ((0.9, 1.0),))}
            for number in range(_ROUNDS + 1):
                say(f"round {number} of {_ROUNDS}" if number else "warming up")
                sides = (lambda kind: _pass(feeds[kind], passes), ask)
                order = (0, 1) if number % 2 else (1, 0)  # neither is always the first
                found = {(kind, i): sides[i](kind) for kind in feeds for i in order}
                rounds += [found] * (number > 0)
    rows = []
    for kind, name in (("two", "two views, as DeCLIP"), ("one", "one view, as open_clip")):
        own, other = ([_speed(one[kind, i], passes) for one in rounds] for i in (0, 1))
        ratio = statistics.median(a.per_core / b.per_core for a, b in zip(own, other))
        rows.append((name, _median(own), _median(other), ratio))
    return Comparison(versions, workers, _FILES, kilobytes, rows)


def _speed(spent: dict[str, float], passes: int) -> Speed:
    return Speed(passes / spent["cpu"], passes / spent["seconds"])


def _median(speeds: list[Speed]) -> Speed:
    return Speed(*(statistics.median(column) for column in zip(*speeds)))


def _feed(folder: str, crops: tuple[tuple[float, float], ...]) -> Feed:
    source = Table(f"{folder}/pictures.csv")
    captions = [text for row in range(len(source)) for text in source[row].texts]
    tokenizer = tokenizers.build(TokenizerConfig("sentencepiece", 64, 77), captions)
    flips = (len(crops) > 1,) * len(crops)
    places = np.arange(_BATCH)
    return Feed(source, tokenizer, 0, _BATCH, places, 224, crops=crops, flips=flips)


def _pass(feed: Feed, passes: int) -> dict[str, float]:
    cpu, start = time.process_time(), time.perf_counter()
    for _ in feed.batches(0, passes // _BATCH):
        pass
    return {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}


@contextlib.contextmanager
def _other(script: pathlib.Path, folder: str, passes: int, workers: int) -> Iterator[tuple]:
    """The other loader's versions, and what measures one pass of it."""
    options = {"pictures": passes, "batch": _BATCH, "workers": workers}
    command = [sys.executable, str(script), folder, *(f"--{k}={v}" for k, v in options.items())]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:

        def answer() -> dict[str, Any]:
            line = process.stdout.readline()
            if not line:
                last = (process.stderr.read().strip().splitlines() or ["it ended"])[-1]
                raise DataError(
                    f"{script}: {last}; it needs pip install torch torchvision, in this environment"
                )
            return json.loads(line)

        def ask(kind: str) -> dict[str, float]:
            process.stdin.write(kind + "\n")
            process.stdin.flush()
            return answer()

        try:
            ready = answer()
            yield ", ".join(f"{k} {v}" for k, v in ready.items() if k != "ready"), ask
        finally:
            process.stdin.close()
            process.wait()


def draw(folder: pathlib.Path, count: int) -> float:
    """Writes JPEGs of 256 on the shorter side, with about the detail and the edges of photographs,
    and pictures.csv; their mean size in bytes."""
    rng = np.random.default_rng(0)
    textures = [_texture(rng, slope) for slope in np.linspace(1.0, 2.0, 8)]
    words = ("a", "red", "dog", "two", "children", "on", "grass", "near", "the", "blue", "house")
    sizes = []
    with (folder / "pictures.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("filepath", "caption"))
        for i in range(count):
            path = folder / f"{i:04d}.jpg"
            height, width = (SHORT, _LONG) if i % 4 else (_LONG, SHORT)
            picture = np.ascontiguousarray(_photo(rng, textures)[:height, :width])
            data = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 90])[1]
            path.write_bytes(data.tobytes())
            sizes.append(len(data))
            table.writerow((path.name, " ".join(rng.choice(words, 10))))
    return statistics.mean(sizes)


def _texture(rng: np.random.Generator, slope: float) -> np.ndarray:
    """Noise of mean 0 and deviation 1 whose amplitude falls as 1 / frequency ** slope."""
    frequency = np.hypot(np.fft.fftfreq(_LONG)[:, None], np.fft.rfftfreq(_LONG)[None])
    frequency[0, 0] = np.inf
    spectrum = np.fft.rfft2(rng.normal(size=(_LONG, _LONG))) / frequency**slope
    noise = np.fft.irfft2(spectrum, (_LONG, _LONG))
    return (noise / noise.std()).astype(np.float32)


def _photo(rng: np.random.Generator, textures: Sequence[np.ndarray]) -> np.ndarray:
    """Textured patches with sharp edges."""
    picture = None
    for _ in range(4):
        texture = np.roll(
            textures[rng.integers(len(textures))], rng.integers(_LONG, size=2), (0, 1)
        )
        contrast, colour = rng.uniform(10, 40, 3), rng.normal(128, 45, 3)
        patch = (texture[..., None] * contrast + colour).astype(np.float32)
        if picture is None:
            picture = patch
            continue
        mask = np.zeros((_LONG, _LONG), np.uint8)
        corners = rng.uniform(-0.2, 1.2, (6, 2)) * _LONG
        cv2.fillPoly(mask, [corners.astype(np.int32)], 1)
        picture = np.where(mask[..., None] > 0, patch, picture)
    return np.clip(picture, 0, 255).astype(np.uint8)


def markdown(found: Comparison) -> list[str]:
    """The comparison as a table for a README."""
    lines = [
        "| images/s per core | clipx | PyTorch DataLoader | ratio |",
        "|---|---|---|---|",
    ]
    for name, own, other, ratio in found.rows:
        lines.append(f"| {name} | {own.per_core:,.0f} | {other.per_core:,.0f} | {ratio:.1f} |")
    lines.append(
        f"\nImages per second of CPU time, medians of {_ROUNDS} rounds in turns: {found.workers} "
        f"threads of clipx, {found.workers} worker processes of PyTorch ({found.versions}), "
        f"{found.files} drawn JPEGs of {SHORT} px and {found.kilobytes:.0f} kB, 224-px views. "
        "clipx also tokenises captions; its photometry runs on the device."
    )
    return lines
