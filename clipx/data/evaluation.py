"""The examples that an evaluator sees."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
from collections.abc import Iterator

import numpy as np
from jaxtyping import UInt8

from clipx.data import class_ids, pictures
from clipx.data.base import Example, Source
from clipx.data.config import TIMEOUT
from clipx.data.framing import CENTRE, Framing
from clipx.data.reading import patiently
from clipx.data.supply import Supply
from clipx.errors import BadSample, DataError


@dataclasses.dataclass(frozen=True)
class EvaluationSet:
    """The first `limit` rows of `source`, with images through open_clip's evaluation transform:
    by default the shorter side resized to `image_size` (Pillow, bicubic), then a centre crop.

    Raises `DataError` for a bad example: evaluation never skips or replaces a row.
    """

    source: Source
    image_size: int
    limit: int | None = None
    timeout: float = TIMEOUT  # `DataConfig.timeout`
    framing: Framing = CENTRE

    @functools.cached_property
    def classes(self) -> tuple[str, ...]:
        """The source's, with names in place of WordNet ids."""
        return class_ids.readable(tuple(self.source.classes))

    def __len__(self) -> int:
        return min(len(self.source), self.limit or len(self.source))

    def texts(self, row: int) -> tuple[str, ...]:
        return self._example(row).texts

    def label(self, row: int) -> int | None:
        return self._example(row).label

    def batches(self, size: int) -> Iterator[UInt8[np.ndarray, "n h w 3"]]:
        """Yields uint8 images in row order, `size` per batch; the last batch may be smaller. Raises
        `StuckError` for a read that does not end in `timeout` seconds."""
        supply = Supply(lambda: self._batches(size), -(-len(self) // size), None, self.timeout)
        try:
            yield from supply
        finally:
            supply.close()

    def _batches(self, size: int) -> Iterator[UInt8[np.ndarray, "n h w 3"]]:
        with concurrent.futures.ThreadPoolExecutor(pictures.threads()) as pool:
            for start in range(0, len(self), size):
                rows = range(start, min(start + size, len(self)))
                yield np.stack(list(pool.map(self.picture, rows)))

    def picture(self, row: int) -> UInt8[np.ndarray, "h w 3"]:
        try:
            example, limits = self._example(row), self.source.limits
            return pictures.evaluation(example, self.image_size, limits, self.framing)
        except BadSample as error:
            raise DataError(f"row {row} of the evaluation set: {error}") from None

    def _example(self, row: int) -> Example:
        if not 0 <= row < len(self):
            raise IndexError(row)
        try:
            return patiently(lambda: self.source[row], self.timeout)
        except BadSample as error:
            raise DataError(f"row {row} of the evaluation set: {error}") from None
