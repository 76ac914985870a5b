"""The page of a search: each query, and the pictures that it found."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import UInt8

from clipx.reporting.templates import render, write_page
from clipx.training.episodes import thumbnail

_SIDE = 320  # pixels of a picture on the page, at most


class Found(Protocol):
    """A row that a search has found."""

    @property
    def score(self) -> float: ...
    @property
    def row(self) -> int: ...
    @property
    def key(self) -> str: ...
    @property
    def caption(self) -> str: ...


class Card(NamedTuple):
    """A found picture, as the page shows it."""

    uri: str  # "" if the picture is gone
    score: str
    caption: str
    key: str


class Shown(NamedTuple):
    """A query and what it found."""

    title: str
    uri: str  # of a query that is a picture
    cards: Sequence[Card]


def write(
    path: str,
    folder: pathlib.Path,
    facts: Sequence[tuple[str, str]],
    results: Sequence[tuple[str, Any, Sequence[Found]]],
    picture: Callable[[int], UInt8[np.ndarray, "h w 3"] | None],
) -> int:
    """Writes the page, and returns how many pictures it lacks.

    results: (title, picture or None, what was found) of each query. picture: the pixels of a row.
    Raises `RunError` for a page that cannot be written.
    """
    shown, missing, made = [], 0, {}
    for title, asked, hits in results:
        cards = []
        for hit in hits:
            if hit.row not in made:
                pixels = picture(hit.row)
                missing += pixels is None
                made[hit.row] = "" if pixels is None else thumbnail(pixels, _SIDE)
            cards.append(Card(made[hit.row], f"{hit.score:.3f}", hit.caption, hit.key))
        shown.append(Shown(title, "" if asked is None else thumbnail(asked, _SIDE), cards))
    text = render(
        "search.html", title="clipx search", folder=folder.resolve(), facts=facts, queries=shown
    )
    write_page(pathlib.Path(path).expanduser(), text)
    return missing
