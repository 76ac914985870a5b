"""Hours within minutes: memory, open files and compiled programs do not grow.

Opt-in, and the training runs take 20 minutes: CLIPX_SOAK=1 python -m pytest -m slow -s
tests/laws/test_soak.py. CLIPX_SOAK=300 trains for 300 seconds.
"""

from __future__ import annotations

import contextlib
import csv
import gc
import json
import os
import pathlib
import resource
import time
from typing import NamedTuple

import cv2
import jax
import numpy as np
import pytest
from chaos.config import get_config
from support.loaders import build_loader
from support.shards import shard

from clipx.data import pack
from clipx.data.sources.table import Table
from clipx.data.sources.webdataset import WebDataset
from clipx.data.text import tokenizers
from clipx.data.text.tokenizers import TokenizerConfig
from clipx.training.session import open_session

SAMPLES, BATCH, ROWS, SIDE = 200_000, 125, 1000, 64
WARM = 40_000  # samples before the first measurement of memory
EVERY = 10_000  # samples between two measurements

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("CLIPX_SOAK" not in os.environ, reason="CLIPX_SOAK is not set"),
    pytest.mark.skipif(not pathlib.Path("/proc/self/statm").exists(), reason="no /proc"),
]


def resident(pid: int) -> int:
    """Bytes of resident memory of a process and of all its children."""
    process, total = pathlib.Path(f"/proc/{pid}"), 0
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
        pages = int((process / "statm").read_text().split()[1])
        total += pages * resource.getpagesize()
    for task in process.glob("task/*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for child in (task / "children").read_text().split():
                total += resident(int(child))
    return total


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Shards of a thousand small JPEGs with one or two captions each."""
    folder = tmp_path_factory.mktemp("soak")
    rng = np.random.default_rng(0)
    with (folder / "captions.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("filepath", "caption"))
        for i in range(ROWS):
            coarse = rng.integers(0, 256, (5, 6, 3), np.uint8)
            cv2.imwrite(str(folder / f"{i}.jpg"), cv2.resize(coarse, (80, SIDE)))
            for j in range(1 + i % 2):
                table.writerow((f"{i}.jpg", f"picture {i} of a dog, said for the {j}th time"))
    pack.pack(Table(str(folder / "captions.csv")), folder / "shards", shard_rows=400)
    return str(folder / "shards" / "*.tar")


@pytest.mark.parametrize("workers", [0, 2])
def test_memory_is_flat(shards, workers):
    source = WebDataset(shards)
    captions = [text for row in range(ROWS) for text in source[row].texts]
    tokenizer = tokenizers.build(TokenizerConfig("sentencepiece", 64, 32), captions)
    loader = build_loader(
        source,
        tokenizer,
        seed=0,
        batch_size=BATCH,
        image_size=SIDE,
        crops=((0.2, 1.0),) * 2,
        flips=(True, True),
        workers=workers,
    )
    seen, looks = 0, []
    for batch in loader.batches(0, SAMPLES // BATCH):
        seen += len(batch["row"])
        if seen >= WARM and seen % EVERY == 0:
            looks.append(resident(os.getpid()))
    assert seen == SAMPLES
    print(f"workers {workers}: {[round(look / 2**20) for look in looks]} MiB")
    assert max(looks) < 1.05 * looks[0]


def minutes():
    """How long the training run is to last."""
    asked = float(os.environ["CLIPX_SOAK"])
    return (asked if asked > 1 else 1200) / 60


class Look(NamedTuple):
    memory: int  # resident bytes, with the data worker's
    files: int  # open
    threads: int
    programs: int  # compiled so far


class Sampler:
    """A `Stop` that ends a run after some minutes, and looks at its process until then."""

    asked = False

    def __init__(self, end: float):
        self.end, self.looks, self.next, self.programs = end, [], 0.0, 0
        jax.monitoring.register_event_duration_secs_listener(self._count)

    def _count(self, event: str, seconds: float, **_) -> None:
        self.programs += event == "/jax/core/compile/backend_compile_duration"

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        jax.monitoring.clear_event_listeners()

    def __call__(self):
        now = time.monotonic()
        if now >= self.next:
            self.next = now + 5
            gc.collect()
            process = pathlib.Path("/proc/self")
            files, threads = (len(list((process / x).iterdir())) for x in ("fd", "task"))
            self.looks.append(Look(resident(os.getpid()), files, threads, self.programs))
        self.asked = now > self.end
        return self.asked


@pytest.mark.parametrize("method", ["protoclip"])  # it does all that a run can
def test_training_is_flat(method, tmp_path, monkeypatch, capsys):
    shard(tmp_path / "pairs.tar", 64)
    monkeypatch.setenv("CHAOS_DATA", str(tmp_path))
    config = get_config(method)
    config.data.workers = 1
    config.train.update(
        total_steps=10**7, save_every_steps=60, eval_every_steps=40, log_every_steps=10, best=""
    )
    config.objective.episode_size = 64
    stop = Sampler(time.monotonic() + 60 * minutes())
    session = open_session(json.loads(config.to_json()), str(tmp_path / "run"), jax.devices()[:1])
    _, finished = session.train(stop)
    assert not finished
    looks = stop.looks
    with capsys.disabled():
        step = session.checkpoints.latest
        print(f"\n{method}: {step:,} steps in {minutes():.0f} minutes, {len(looks)} looks")
        for i in range(0, len(looks), max(len(looks) // 12, 1)):
            memory, *rest = looks[i]
            print(f"  {memory / 2**20:.0f} MiB, files, threads, programs: {rest}")
    warm, end = looks[len(looks) // 4 : len(looks) // 2], looks[-len(looks) // 4 :]
    assert {look.programs for look in end} == {warm[-1].programs}
    for what in ("files", "threads"):
        # a save opens some while it lasts
        assert max(getattr(x, what) for x in end) <= max(getattr(x, what) for x in warm) + 2
    # Orbax and TensorStore keep some 0.3 MB of each save
    assert max(x.memory for x in end) < 1.05 * max(x.memory for x in warm)
