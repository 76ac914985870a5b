"""Modality gap: how far pictures and captions are apart in their space (Liang et al. 2022)."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float

from clipx.config.ranges import Count
from clipx.errors import ConfigError
from clipx.evaluators.base import Encode, Evaluator, Examples, captions_of, rows_of
from clipx.types import Metric


@dataclasses.dataclass(frozen=True)
class ModalityGap(Evaluator):
    """Statistics of the unit embeddings of pictures and of each picture's first caption, as in
    ProtoCLIP's analyze_features.py.

    `gap` is the distance between the mean picture and the mean caption. `image_std` and `text_std`
    are standard deviations (with n - 1), averaged over dimensions. `image_self_similarity` and
    `text_self_similarity` are the mean cosine of all pairs of rows, each row with itself included,
    over the pairs with a positive cosine only. (That file does so; over all pairs it is less.)

    chunk: how many rows are compared at once with all rows.
    """

    metrics = {
        "gap": Metric(column="gap"),
        "*_std": Metric(),
        "*_self_similarity": Metric(),
    }
    pairs = True

    needs = "captions"

    examples: Examples
    batch_size: Count = 256
    chunk: Count = 256

    def __call__(self, encode: Encode) -> dict[str, float]:
        where, size = "modality_gap.examples", self.batch_size
        texts, _ = captions_of(self.examples, where, most=1)
        if len(texts) < 2:
            raise ConfigError(where, f"{len(texts)} examples", "at least two")
        rows = {
            "image": rows_of(encode.image, self.examples.batches(size), "unit"),
            "text": rows_of(
                encode.text, (texts[i : i + size] for i in range(0, len(texts), size)), "unit"
            ),
        }
        means = [x.mean(axis=0, dtype=np.float64) for x in rows.values()]
        return {
            "gap": float(np.linalg.norm(means[0] - means[1])),
            **{
                f"{name}_std": float(x.std(axis=0, ddof=1, dtype=np.float64).mean())
                for name, x in rows.items()
            },
            **{
                f"{name}_self_similarity": self_similarity(x, self.chunk)
                for name, x in rows.items()
            },
        }


def self_similarity(rows: Float[np.ndarray, "n d"], chunk: int) -> float:
    """The mean of the positive inner products of all pairs of rows; 0 if none is positive."""
    total, count = 0.0, 0
    for start in range(0, len(rows), chunk):
        products = rows[start : start + chunk] @ rows.T
        positive = products[products > 0]
        total, count = total + positive.sum(dtype=np.float64), count + len(positive)
    return float(total / max(count, 1))
