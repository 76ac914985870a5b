"""Modality gap: how pictures and captions lie in the space that they share (Liang et al. 2022)."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float

from clipx.errors import ConfigError
from clipx.evaluators.base import Encode, Evaluator, Examples, captions_of, rows_of
from clipx.types import Metric


@dataclasses.dataclass(frozen=True)
class ModalityGap(Evaluator):
    """Of the unit rows of pictures and of the first caption of each, as ProtoCLIP's
    analyze_features.py: `gap`, the distance between their means; `image_std` and `text_std`, the
    mean over dimensions of the standard deviation (n - 1); `image_self_similarity` and
    `text_self_similarity`, the mean cosine of a row with a row, itself among them, over those
    pairs alone whose cosine is positive (so that file has it; over all pairs it is less).

    chunk: rows that are compared at once with all.
    """

    metrics = {
        "gap": Metric(column="gap"),
        "*_std": Metric(),
        "*_self_similarity": Metric(),
    }

    examples: Examples
    batch_size: int = 256
    chunk: int = 256

    def __post_init__(self):
        for name in ("batch_size", "chunk"):
            if getattr(self, name) < 1:
                raise ConfigError(f"modality_gap.{name}", str(getattr(self, name)), "at least 1")

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
    """The mean of the positive products of rows with rows; 0 where there is none."""
    total, count = 0.0, 0
    for start in range(0, len(rows), chunk):
        products = rows[start : start + chunk] @ rows.T
        positive = products[products > 0]
        total, count = total + positive.sum(dtype=np.float64), count + len(positive)
    return float(total / max(count, 1))
