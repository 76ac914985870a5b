"""What an evaluator sees of a run: a way to encode, and the examples it was given."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from clipx.types import Encoded


class Encode(Protocol):
    """Both towers at fixed parameters. Rows come back as NumPy arrays, on any mesh the same."""

    def image(self, pictures: np.ndarray, fields: tuple[str, ...] = ()) -> Encoded:
        """Encodes uint8 pictures [n, h, w, 3]. `fields` of `Encoded` are filled; () means those
        that `similarity` needs."""

    def text(self, texts: Sequence[str], fields: tuple[str, ...] = ()) -> Encoded:
        """Encodes strings, tokenised as in training."""

    def similarity(self, images: Encoded, texts: Encoded) -> np.ndarray:
        """Scores [i, t], float32; higher is more alike. Only their order and, within one method,
        their differences mean anything."""


class Examples(Protocol):
    """An evaluation set: decoded, resized and centre-cropped, in the order of its rows. A bad
    example raises; nothing is skipped."""

    classes: tuple[str, ...]

    def __len__(self) -> int: ...

    def texts(self, row: int) -> tuple[str, ...]:
        """The captions of one row, read without decoding its picture where the source can."""

    def label(self, row: int) -> int | None: ...

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """uint8 pictures [n, h, w, 3], n = size but for the last."""


@runtime_checkable
class Evaluator(Protocol):
    """A frozen dataclass: `examples` is given, its other fields are its config keys. One subclass a
    file; the file's name is the config's name. It knows `encode`, never the trainer."""

    examples: Examples

    def __call__(self, encode: Encode) -> dict[str, float]: ...
