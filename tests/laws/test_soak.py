"""Hours of data loading within minutes: memory does not grow.

Opt-in: CLIPX_SOAK=1 python -m pytest -m slow tests/laws/test_soak.py
"""

from __future__ import annotations

import csv
import os
import pathlib
import resource

import cv2
import numpy as np
import pytest
from support.loaders import build_loader

from clipx.data import pack
from clipx.data.sources.table import Table
from clipx.data.sources.webdataset import WebDataset
from clipx.data.text import tokenizers
from clipx.data.text.tokenizers import TokenizerConfig

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
    pages = int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1])
    total = pages * resource.getpagesize()
    for task in pathlib.Path(f"/proc/{pid}/task").iterdir():
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
