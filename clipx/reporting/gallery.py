"""Tables of the report: similarities of held-out pictures and captions."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import Float, Int, UInt8

from clipx.evaluators.base import Encode, Examples

DEPTH = 5  # pictures shown per query
_QUERIES = 8
_BATCH = 256  # pictures that are encoded at a time
_MATRIX = 20  # pictures in the matrix: more would be too small to see


class Pictures(Protocol):
    """Pictures by their row."""

    def __getitem__(self, row: int, /) -> UInt8[np.ndarray, "h w 3"]: ...


class Samples(NamedTuple):
    """A model's similarities of held-out pairs. A picture may have several captions."""

    pictures: Pictures
    captions: Sequence[str]
    similarity: Float[np.ndarray, "n c"]
    owner: Int[np.ndarray, " t"]  # the picture that each caption belongs to
    columns: Sequence[int] | None = None  # captions of the similarities; None: all of them

    def scores(self, captions: Sequence[int]) -> Float[np.ndarray, "n k"]:
        """The similarities of all pictures with some captions."""
        if self.columns is not None:
            places = {caption: place for place, caption in enumerate(self.columns)}
            captions = [places[caption] for caption in captions]
        return np.asarray(self.similarity, np.float64)[:, list(captions)]


class Cell(NamedTuple):
    """The similarity of a caption and a picture."""

    own: bool  # whether the picture is the caption's own
    shade: float  # 0 for the matrix's lowest similarity, 1 for its highest
    tip: str


class Matrix(NamedTuple):
    """Similarities of captions (rows) with their pictures (columns)."""

    pictures: Sequence[int]
    rows: Sequence[tuple[str, Sequence[Cell]]]  # (caption, cells)
    right: int  # number of captions whose own picture scores highest
    low: float  # lowest similarity
    high: float  # highest similarity


class Hit(NamedTuple):
    """A picture among the best of a query."""

    picture: int
    score: float
    right: bool


class Query(NamedTuple):
    """The result of a search with a caption."""

    caption: str
    hits: Sequence[Hit]  # the best first
    rank: int  # rank of the best right picture; the first rank is 1
    pictures: int  # number of pictures searched


def matrix(samples: Samples) -> Matrix:
    """Similarities of the first 20 pictures with each other's first captions."""
    captions = _of_matrix(samples.owner)
    pictures = np.asarray(samples.owner)[captions]
    scores = samples.scores(captions)[pictures].T
    finite = scores[np.isfinite(scores)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
    shade = np.nan_to_num((scores - low) / max(high - low, 1e-12))
    rows = []
    for i, text in enumerate(samples.captions[caption] for caption in captions):
        tips = [f"{text} | picture {p}: {score:.4g}" for p, score in zip(pictures, scores[i])]
        rows.append((text, [Cell(i == j, shade[i, j], tip) for j, tip in enumerate(tips)]))
    right = sum(int(np.argmax(row) == i) for i, row in enumerate(shade))
    return Matrix(pictures.tolist(), rows, right, low, high)


def queries(samples: Samples) -> list[Query]:
    """Searches among all pictures with at most eight distinct captions, spread evenly.

    Every picture that has the same caption counts as right. NaN scores rank last.
    """
    shown, chosen = [], _of_queries(samples.captions, samples.owner)
    for caption, score in zip(chosen, samples.scores(chosen).T):
        text = samples.captions[caption]
        same = [i for i, other in enumerate(samples.captions) if other == text]
        right = {int(samples.owner[i]) for i in same}
        score = np.nan_to_num(score, nan=-np.inf)
        order = np.argsort(-score, kind="stable").tolist()
        hits = [Hit(p, float(score[p]), p in right) for p in order[:DEPTH]]
        rank = 1 + next(i for i, p in enumerate(order) if p in right)
        shown.append(Query(text, hits, rank, len(order)))
    return shown


def look(
    encode: Encode, examples: Examples, captions: Sequence[str], owner: Int[np.ndarray, " t"]
) -> Samples:
    """The similarities that `matrix` and `queries` show, of all pictures of `examples`. owner: the
    picture that each caption belongs to."""
    columns = sorted({*_of_matrix(owner), *_of_queries(captions, owner)})
    texts = encode.text([captions[i] for i in columns])
    rows, size = [], min(_BATCH, len(examples))
    for batch in examples.batches(size):
        last = np.repeat(batch[-1:], size - len(batch), axis=0)  # one program serves all batches
        images = encode.image(np.concatenate([batch, last]))
        rows.append(encode.similarity(images, texts)[: len(batch)])
    return Samples(_Decoded(examples), captions, np.concatenate(rows), np.asarray(owner), columns)


@dataclasses.dataclass(frozen=True)
class _Decoded:
    """Pictures of examples, decoded when they are asked for."""

    examples: Any  # `Examples` that decode single pictures

    def __getitem__(self, row: int) -> UInt8[np.ndarray, "h w 3"]:
        return self.examples.picture(row)


def _of_matrix(owner: Sequence[int] | np.ndarray) -> list[int]:
    """The captions of the matrix."""
    return _first_captions(owner)[:_MATRIX]


def _of_queries(captions: Sequence[str], owner: Sequence[int] | np.ndarray) -> list[int]:
    """The captions of the queries: distinct ones, spread evenly over the pictures."""
    first = _first_captions(owner)
    distinct = list({captions[c]: c for c in reversed(first)}.values())[::-1]
    places = np.linspace(0, len(distinct) - 1, min(_QUERIES, len(distinct))).round().astype(int)
    return [distinct[int(place)] for place in places]


def _first_captions(owner: Sequence[int] | np.ndarray) -> list[int]:
    """Indices of the first caption of each picture, in the order of the pictures."""
    first: dict[int, int] = {}
    for caption, picture in enumerate(owner):
        first.setdefault(int(picture), caption)
    return [first[picture] for picture in sorted(first)]
