"""Compares clipx's loader with a PyTorch DataLoader on generated images."""

from __future__ import annotations

import contextlib
import csv
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import cv2
import numpy as np

from clipx.data import pictures
from clipx.data.config import DataConfig
from clipx.data.loader import Loader, captions
from clipx.data.sources.table import Table
from clipx.data.text import tokenizers
from clipx.data.text.tokenizers import TokenizerConfig
from clipx.errors import DataError, install_hint
from clipx.planning.turns import Missing, Side, Turn
from clipx.types import View, Views

SHORT, _LONG = 256, 341  # sides of the generated images, in pixels
_BATCH = 64  # batch size of both loaders


class Speed(NamedTuple):
    """The speed of a loader in one round."""

    per_core: float  # examples per second of CPU time, summed over all processes
    wall: float  # examples per second of elapsed time


class Comparison(NamedTuple):
    """What `against` measured."""

    versions: str  # of the other loader's libraries
    workers: int  # threads of clipx, processes of the other loader
    files: int  # number of JPEGs
    rounds: int
    kilobytes: float  # mean size of a JPEG
    rows: list[tuple[str, list[Speed], list[Speed]]]  # name, clipx and the other in each round


def against(
    script: pathlib.Path,
    *,
    passes: int = 1280,
    files: int = 256,
    rounds: int = 5,
    say: Callable[[str], None] = lambda text: None,
) -> Comparison:
    """Measures `Loader` and the loader of `script` in alternation on the same generated images.
    `Loader` has as many threads as the other loader has processes.

    passes: examples per round, rounded down to full batches. files: images to generate. say:
    receives lines of progress. Raises `DataError` if the script does not exist or cannot run.
    """
    if not script.is_file():
        raise DataError(f"{script} does not exist; --against=torch needs a checkout of clipx")
    workers = min(pictures.cores(), 16)
    passes -= passes % _BATCH
    with tempfile.TemporaryDirectory(prefix="clipx-bench-") as folder:
        say(f"generating {files} images")
        kilobytes = draw(pathlib.Path(folder), files) / 1000
        with _other(script, folder, passes, workers) as (versions, ask):
            measured = []
            loaders = {
                "two": _loader(folder, ((0.2, 1.0),) * 2),
                "one": _loader(folder, ((0.9, 1.0),)),
            }
            for number in range(rounds + 1):
                say(f"round {number} of {rounds}" if number else "warming up")
                sides = (lambda kind: _pass(loaders[kind], passes), ask)
                order = (0, 1) if number % 2 else (1, 0)  # no loader is always the first
                spent = {(kind, i): sides[i](kind) for kind in loaders for i in order}
                measured += [spent] * (number > 0)
    rows = []
    for kind, name in (("two", "two views, as DeCLIP"), ("one", "one view, as open_clip")):
        ours, theirs = ([_speed(spent[kind, i], passes) for spent in measured] for i in (0, 1))
        rows.append((name, ours, theirs))
    return Comparison(versions, workers, files, rounds, kilobytes, rows)


def _speed(spent: dict[str, float], passes: int) -> Speed:
    return Speed(passes / spent["cpu"], passes / spent["seconds"])


def _loader(folder: str, crops: tuple[tuple[float, float], ...]) -> Loader:
    source = Table(f"{folder}/pictures.csv")
    tokenizer = tokenizers.build(TokenizerConfig("sentencepiece", 64, 77), captions(source))
    pictures = tuple(View(crop, len(crops) > 1, None) for crop in crops)
    return Loader(
        source,
        tokenizer,
        Views(pictures),
        DataConfig("table"),
        seed=0,
        batch_size=_BATCH,
        positions=np.arange(_BATCH),
        image_size=224,
    )


def _pass(loader: Loader, passes: int) -> dict[str, float]:
    """Elapsed and CPU seconds that `loader` takes for `passes` examples."""
    cpu, start = time.process_time(), time.perf_counter()
    for _ in loader.batches(0, passes // _BATCH):
        pass
    return {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}


@contextlib.contextmanager
def _other(
    script: pathlib.Path, folder: str, passes: int, workers: int
) -> Iterator[tuple[str, Callable[[str], Turn]]]:
    """A context that runs the other loader. Yields (versions of its libraries, a function that
    measures one pass, as `_pass` does)."""
    options = {"pictures": passes, "batch": _BATCH, "workers": workers}
    command = [sys.executable, str(script), folder, *(f"--{k}={v}" for k, v in options.items())]
    try:
        with Side(command) as side:
            yield side.versions, side.turn
    except Missing as error:
        raise DataError(f"{error}; {install_hint('peers')}") from None


def draw(folder: pathlib.Path, count: int) -> float:
    """Writes `count` JPEGs, with about the detail and edges of photographs, and pictures.csv into
    `folder`. The shorter side has 256 pixels. Returns the mean size of a JPEG in bytes."""
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
    """Noise of mean 0 and standard deviation 1. Its amplitude falls as 1 / frequency ** slope."""
    frequency = np.hypot(np.fft.fftfreq(_LONG)[:, None], np.fft.rfftfreq(_LONG)[None])
    frequency[0, 0] = np.inf
    spectrum = np.fft.rfft2(rng.normal(size=(_LONG, _LONG))) / frequency**slope
    noise = np.fft.irfft2(spectrum, (_LONG, _LONG))
    return (noise / noise.std()).astype(np.float32)


def _photo(rng: np.random.Generator, textures: Sequence[np.ndarray]) -> np.ndarray:
    """An image of textured patches with sharp edges, uint8 [341, 341, 3]."""
    picture: np.ndarray | None = None
    for _ in range(4):
        texture = np.roll(
            textures[int(rng.integers(len(textures)))], rng.integers(_LONG, size=2), (0, 1)
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
    assert picture is not None
    return np.clip(picture, 0, 255).astype(np.uint8)


def markdown(comparison: Comparison) -> list[str]:
    """The comparison as lines of Markdown: a table and how it was measured."""
    lines = [
        "| images/s per core | clipx | PyTorch DataLoader | ratio |",
        "|---|---|---|---|",
    ]
    for name, *sides in comparison.rows:
        ours, theirs = ([speed.per_core for speed in side] for side in sides)
        ratio = statistics.median(a / b for a, b in zip(ours, theirs))
        medians = statistics.median(ours), statistics.median(theirs)
        lines.append("| {} | {:,.0f} | {:,.0f} | {:.1f} |".format(name, *medians, ratio))
    lines.append(
        f"\nImages per second of CPU time, medians of {comparison.rounds} rounds in alternation: "
        f"{comparison.workers} threads of clipx, {comparison.workers} worker processes of PyTorch "
        f"({comparison.versions}), {comparison.files} generated JPEGs of {SHORT} px and "
        f"{comparison.kilobytes:.0f} kB, 224-px views. "
        "clipx also tokenises captions; its photometry runs on the device."
    )
    return lines
