"""Tables of the report: similarities of held-out pictures and captions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

DEPTH = 5  # pictures shown per query
_QUERIES = 8
_MATRIX = 20  # pictures in the matrix: more would be too small to see


class Samples(NamedTuple):
    """A model's similarities of held-out pairs. A picture may have several captions."""

    pictures: UInt8[np.ndarray, "n h w 3"]
    captions: Sequence[str]
    similarity: Float[np.ndarray, "n t"]
    owner: Int[np.ndarray, " t"]  # the picture that each caption belongs to


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
    captions = _first_captions(samples)[:_MATRIX]
    pictures = samples.owner[captions]
    places = np.ix_(pictures, captions)  # pyright: ignore[reportArgumentType, reportCallIssue]
    scores = np.asarray(samples.similarity, np.float64)[places].T
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
    """Searches with at most eight distinct captions, spread evenly over the samples.

    Every picture that has the same caption counts as right. NaN scores rank last.
    """
    distinct = _first_captions(samples, distinct=True)
    places = np.linspace(0, len(distinct) - 1, min(_QUERIES, len(distinct))).round().astype(int)
    shown = []
    for caption in (distinct[int(place)] for place in places):
        text = samples.captions[caption]
        same = [i for i, other in enumerate(samples.captions) if other == text]
        right = {int(samples.owner[i]) for i in same}
        score = np.nan_to_num(samples.similarity[:, caption].astype(np.float64), nan=-np.inf)
        order = np.argsort(-score, kind="stable").tolist()
        hits = [Hit(p, float(score[p]), p in right) for p in order[:DEPTH]]
        rank = 1 + next(i for i, p in enumerate(order) if p in right)
        shown.append(Query(text, hits, rank, len(order)))
    return shown


def _first_captions(samples: Samples, distinct: bool = False) -> list[int]:
    """Indices of the first caption of each picture, in the order of the pictures. distinct: keeps
    only the first index of every distinct caption."""
    first: dict[int, int] = {}
    for caption, picture in enumerate(samples.owner):
        first.setdefault(int(picture), caption)
    chosen = [first[picture] for picture in sorted(first)]
    if distinct:
        chosen = list({samples.captions[c]: c for c in reversed(chosen)}.values())[::-1]
    return chosen
