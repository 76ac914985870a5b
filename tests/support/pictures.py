"""A data source of generated pictures, and a tokenizer that decodes to exactly what it encoded."""

from __future__ import annotations

import dataclasses
import io
import tempfile

import numpy as np
from PIL import Image

from clipx.data.base import Example, Source
from clipx.data.text import tokenizers
from clipx.data.text.tokenizers import TokenizerConfig
from clipx.errors import BadSample

ROWS = 50


def encode(pixels: np.ndarray, kind: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def photo(height: int = 48, width: int = 64, seed: int = 0) -> np.ndarray:
    """A smooth picture, like a photograph."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


@dataclasses.dataclass(frozen=True)
class Pictures(Source):
    """Row i is a picture of its own with its captions. `bad` rows raise; `broken` rows hold a
    truncated file."""

    bad: tuple[int, ...] = ()
    broken: tuple[int, ...] = ()
    rows: int = ROWS
    captions: int = 3
    words: str = "text"
    classes = ()

    def __len__(self):
        return self.rows

    def __getitem__(self, row):
        if row in self.bad:
            raise BadSample(f"key{row}", "empty caption")
        image = encode(photo(seed=row))
        if row in self.broken:
            image = image[: len(image) // 2]
        texts = tuple(f"row {row} {self.words} {i}" for i in range(self.captions))
        return Example(image, texts, row, f"key{row}", row)


def letters():
    """A byte-pair tokenizer with one merge, which decodes to exactly what it encoded."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as merges:
        merges.write("#version: 0.2\nt h\n")
        merges.flush()
        config = TokenizerConfig("clip_bpe", vocab_size=515, context=40, path=merges.name)
        return tokenizers.build(config)


TOKENIZER = letters()
