"""Retrieval in both directions between pictures and their captions (Karpathy & Fei-Fei 2015)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from clipx.errors import ConfigError
from clipx.evaluators.base import Encode, Evaluator, Examples, captions_of
from clipx.types import Encoded, Metric

_DEPTHS = (1, 5, 10)


def _recall(direction: str, k: int) -> Metric:
    """CLIP_benchmark names a direction by what is found, clipx by what looks for what."""
    column, found = direction.replace("_to_", "→"), direction.rpartition("_")[2]
    return Metric(
        *("more", "percent"),
        column=f"{column} R@",
        label=str(k),
        benchmark=f"{found}_retrieval_recall@{k}",
    )


@dataclasses.dataclass(frozen=True)
class Retrieval(Evaluator):
    """Recalls between 0 and 1, `image_to_text_R@1` to `text_to_image_R@10`, their `mean_recall`,
    and each direction's `median_rank` (1 is best).

    A picture finds its text when any of its captions is among the first k of all captions; every
    caption looks for its one picture. Equal scores stand in random order, and recalls and ranks are
    the expectation over it: a model that says the same of everything gets exactly chance.

    captions: only the first so many of each picture; None takes all, however many each has.
    chunk: pictures and captions compared at once. Embeddings and one strip of chunk x N scores are
    held, never the whole matrix.
    """

    metrics = {
        **{
            f"{direction}_R@{k}": _recall(direction, k)
            for direction in ("image_to_text", "text_to_image")
            for k in _DEPTHS
        },
        "mean_recall": Metric("more", "percent"),
        "*_median_rank": Metric("less"),
    }
    task = "zeroshot_retrieval"

    examples: Examples
    captions: int | None = None
    batch_size: int = 256
    chunk: int = 256

    def __post_init__(self):
        for name in ("captions", "batch_size", "chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"retrieval.{name}", str(value), "at least 1")

    def __call__(self, encode: Encode) -> dict[str, float]:
        texts, owner = captions_of(self.examples, "retrieval.examples", most=self.captions)
        size = self.batch_size
        images = _encode(encode.image, self.examples.batches(size))
        captions = _encode(encode.text, (texts[i : i + size] for i in range(0, len(texts), size)))
        row, similarity = np.arange(len(self.examples)), encode.similarity

        def transposed(texts: Encoded, images: Encoded):
            return similarity(images, texts).T

        def of_images(rows: slice):
            return row[rows, None] == owner

        def of_texts(rows: slice):
            return owner[rows, None] == row

        found = {
            "image_to_text": _stand(similarity, images, captions, of_images, self.chunk),
            "text_to_image": _stand(transposed, captions, images, of_texts, self.chunk),
        }
        recalls = {
            f"{direction}_R@{k}": float(np.mean(places.within(k)))
            for direction, places in found.items()
            for k in _DEPTHS
        }
        medians = {f"{name}_median_rank": float(np.median(p.rank())) for name, p in found.items()}
        return {**recalls, "mean_recall": float(np.mean(list(recalls.values()))), **medians}


class Places(NamedTuple):
    """Where the best right answer of each query stands, up to the order of equal scores."""

    above: Int[np.ndarray, " q"]  # wrong answers that score higher
    right: Int[np.ndarray, " q"]  # right answers that score the same; at least 1
    wrong: Int[np.ndarray, " q"]  # wrong answers that score the same

    def within(self, k: int) -> Float[np.ndarray, " q"]:
        """The probability that one of `right` is among the first k, in random order."""
        none = np.ones(len(self.above))
        for place in range(k):  # the draw at this place, given only wrong answers so far
            drawn = np.maximum(place - self.above, 0)
            left = np.maximum(self.wrong - drawn, 0)
            none *= np.where(place < self.above, 1, left / (left + self.right))
        return 1 - none

    def rank(self) -> Float[np.ndarray, " q"]:
        """The expected place, from 1."""
        return 1 + self.above + self.wrong / (self.right + 1)


def _stand(
    score: Callable[[Encoded, Encoded], Float[np.ndarray, "q n"]],
    queries: Encoded,
    answers: Encoded,
    own: Callable[[slice], Bool[np.ndarray, "q n"]],
    chunk: int,
) -> Places:
    """Where the best right answer of each query stands among all answers; `own` says which are
    right for some of the queries."""
    strips = []
    for rows in _chunks(_len(queries), chunk):
        part = _take(queries, rows)
        scores = [score(part, _take(answers, s)) for s in _chunks(_len(answers), chunk)]
        strips.append(_places(np.concatenate(scores, axis=1), own(rows)))
    return Places(*map(np.concatenate, zip(*strips)))


def _places(scores: Float[np.ndarray, "q n"], own: Bool[np.ndarray, "q n"]) -> Places:
    best = np.max(scores, axis=1, keepdims=True, where=own, initial=-np.inf)
    equal = ~(best > scores) & ~(scores > best)  # a NaN compares as equal
    above = np.sum((scores > best) & ~own, axis=1)
    return Places(above, np.sum(equal & own, axis=1), np.sum(equal & ~own, axis=1))


def _encode(encode: Callable[[Any], Encoded], batches: Iterable[Sequence]) -> Encoded:
    parts = [encode(batch) for batch in batches]
    return jax.tree.map(lambda *rows: np.concatenate(rows), *parts)


def _chunks(n: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def _take(encoded: Encoded, rows: slice) -> Encoded:
    return jax.tree.map(lambda x: x[rows], encoded)


def _len(encoded: Encoded) -> int:
    return len(jax.tree.leaves(encoded)[0])
