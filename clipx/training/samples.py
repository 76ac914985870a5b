"""Pairs of the evals that a report shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from clipx.data.base import Source
from clipx.training.schema import EvalSpec

_SAMPLES = 32  # pictures in the report


def held_out_pairs(
    evals: Sequence[EvalSpec], image_size: int, held_out: Callable[[], Source]
) -> tuple[np.ndarray, list[str], np.ndarray] | None:
    """(pictures uint8 [n, h, w, 3], captions, the index of each caption's picture) of the first
    eval that has examples with captions; None if none has. held_out: as for `EvalSpec.examples`."""
    for spec in evals:
        examples = spec.examples(image_size, held_out)
        if examples is None:
            continue
        count = min(_SAMPLES, len(examples))
        rows = [row for row in range(count) if examples.texts(row)]
        if rows:
            pictures = next(examples.batches(_SAMPLES))[rows]
            captions = [(text, i) for i, row in enumerate(rows) for text in examples.texts(row)]
            return pictures, [text for text, _ in captions], np.array([i for _, i in captions])
    return None
