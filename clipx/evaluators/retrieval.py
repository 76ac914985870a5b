"""Retrieval in both directions between pictures and their captions (Karpathy & Fei-Fei 2015)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from clipx.config.ranges import Count
from clipx.evaluators.base import Encode, Evaluator, Examples, captions_of
from clipx.types import Encoded, Metric

_DEPTHS = (1, 5, 10)


def _recall(direction: str, k: int) -> Metric:
    """The metric of one recall. CLIP_benchmark names a direction by its answers alone."""
    column, answers = direction.replace("_to_", "→"), direction.rpartition("_")[2]
    return Metric(
        *("more", "percent"),
        column=f"{column} R@",
        label=str(k),
        benchmark=f"{answers}_retrieval_recall@{k}",
    )


@dataclasses.dataclass(frozen=True)
class Retrieval(Evaluator):
    """Recalls between 0 and 1, `image_to_text_R@1` to `text_to_image_R@10`, their `mean_recall`,
    and each direction's `median_rank` (1 is best).

    image_to_text: a hit is a picture with any of its captions among the first k of all captions.
    text_to_image: a hit is a caption with its one picture among the first k of all pictures. Ties
    are broken at random, and recalls and ranks are expectations over the ties, so that a model that
    encodes everything alike gets exactly chance.

    captions: how many captions of each picture to use, from its first; None: all.
    chunk: pictures and captions that are compared at once. In memory are the embeddings and one
    strip of chunk x N scores, never the complete matrix.
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
    pairs = True
    needs = "captions"

    examples: Examples
    captions: Count | None = None
    batch_size: Count = 256
    chunk: Count = 256

    def __call__(self, encode: Encode) -> dict[str, float]:
        texts, picture_of = self._captions
        size = self.batch_size
        images = _encode(encode.image, self.examples.batches(size))
        captions = _encode(encode.text, (texts[i : i + size] for i in range(0, len(texts), size)))
        picture, similarity = np.arange(len(self.examples)), encode.similarity

        def transposed(texts: Encoded, images: Encoded) -> Float[np.ndarray, "t i"]:
            return similarity(images, texts, query="text").T

        def texts_of(rows: slice) -> Bool[np.ndarray, "i t"]:
            return picture[rows, None] == picture_of

        def pictures_of(rows: slice) -> Bool[np.ndarray, "t i"]:
            return picture_of[rows, None] == picture

        places = {
            "image_to_text": _rank(similarity, images, captions, texts_of, self.chunk),
            "text_to_image": _rank(transposed, captions, images, pictures_of, self.chunk),
        }
        return _metrics(places)

    def sizes(self) -> dict[str, int]:
        return {**super().sizes(), "captions": len(self._captions[0])}

    def chance(self) -> dict[str, float]:
        pictures, captions = len(self.examples), len(self._captions[0])
        own = np.bincount(self._captions[1], minlength=pictures)  # captions of each picture
        none, one = np.zeros(pictures, int), np.ones(captions, int)
        places = {
            "image_to_text": Places(none, own, captions - own),
            "text_to_image": Places(0 * one, one, (pictures - 1) * one),
        }
        return _metrics(places)

    @functools.cached_property
    def _captions(self) -> tuple[list[str], Int[np.ndarray, " t"]]:
        """(the captions, the picture that each belongs to)."""
        return captions_of(self.examples, "retrieval.examples", most=self.captions)


class Places(NamedTuple):
    """The rank of each query's best right answer, up to the order of equal scores."""

    above: Int[np.ndarray, " q"]  # wrong answers that score higher
    right: Int[np.ndarray, " q"]  # right answers that score the same; at least 1
    wrong: Int[np.ndarray, " q"]  # wrong answers that score the same

    def within(self, k: int) -> Float[np.ndarray, " q"]:
        """The probability that a right answer is among the first k, with ties in random order."""
        miss = np.ones(len(self.above))  # the probability that all places so far are wrong
        for place in range(k):
            taken = np.maximum(place - self.above, 0)  # tied wrong answers on earlier places
            left = np.maximum(self.wrong - taken, 0)
            miss *= np.where(place < self.above, 1, left / (left + self.right))
        return 1 - miss

    def rank(self) -> Float[np.ndarray, " q"]:
        """The expected rank, from 1."""
        return 1 + self.above + self.wrong / (self.right + 1)


def _metrics(places: Mapping[str, Places]) -> dict[str, float]:
    """The metrics of the places of both directions."""
    recalls = {
        f"{direction}_R@{k}": float(np.mean(found.within(k)))
        for direction, found in places.items()
        for k in _DEPTHS
    }
    medians = {f"{name}_median_rank": float(np.median(p.rank())) for name, p in places.items()}
    return {**recalls, "mean_recall": float(np.mean(list(recalls.values()))), **medians}


def _rank(
    score: Callable[[Encoded, Encoded], Float[np.ndarray, "q n"]],
    queries: Encoded,
    answers: Encoded,
    right: Callable[[slice], Bool[np.ndarray, "q n"]],
    chunk: Count,
) -> Places:
    """The places of all queries among all answers. `right(rows)` is a mask of the right answers for
    those queries."""
    strips = []
    for rows in _chunks(_len(queries), chunk):
        strip = _take(queries, rows)
        scores = [score(strip, _take(answers, s)) for s in _chunks(_len(answers), chunk)]
        strips.append(_places(np.concatenate(scores, axis=1), right(rows)))
    return Places(*map(np.concatenate, zip(*strips)))


def _places(scores: Float[np.ndarray, "q n"], right: Bool[np.ndarray, "q n"]) -> Places:
    best = np.max(scores, axis=1, keepdims=True, where=right, initial=-np.inf)
    equal = ~(best > scores) & ~(scores > best)  # a NaN compares as equal
    above = np.sum((scores > best) & ~right, axis=1)
    return Places(above, np.sum(equal & right, axis=1), np.sum(equal & ~right, axis=1))


def _encode(encode: Callable[[Any], Encoded], batches: Iterable[Sequence | np.ndarray]) -> Encoded:
    encoded = [encode(batch) for batch in batches]
    return jax.tree.map(lambda *rows: np.concatenate(rows), *encoded)


def _chunks(n: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def _take(encoded: Encoded, rows: slice) -> Encoded:
    return jax.tree.map(lambda x: x[rows], encoded)


def _len(encoded: Encoded) -> int:
    return len(jax.tree.leaves(encoded)[0])
