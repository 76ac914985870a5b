"""A page that shows rows of a data set as a model receives them: pictures, captions, views and
tokens."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32, UInt8
from PIL import Image

from clipx.data import pictures
from clipx.data.base import Example, Source
from clipx.data.text.tokenizers import Tokenizer
from clipx.reporting.templates import render

_SIDE = 320  # longest side of a source picture on the page, in pixels


class Text(NamedTuple):
    """One text view of a row."""

    kind: str  # "caption", "augmented" or "other"
    ids: Int32[np.ndarray, " n"]


class Shown(NamedTuple):
    """One row of the data set."""

    row: int
    key: str
    pixels: UInt8[np.ndarray, "h w 3"]
    captions: Sequence[str]
    label: str | None
    views: Sequence[UInt8[np.ndarray, "side side 3"]]  # after photometry
    texts: Sequence[Text]
    bad: Sequence[str] = ()  # unusable rows that this row replaces, each with the reason


class Remembering:
    """A source that remembers the examples that were read from it, by their row id. The id of an
    example may differ from the row under which it was read."""

    def __init__(self, source: Source):
        self._source, self.classes = source, source.classes
        self.seen: dict[int, Example] = {}

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, row: int) -> Example:
        example = self._source[row]
        return self.seen.setdefault(example.row, example)

    def keys(self) -> Iterator[str]:
        return self._source.keys()


def shown(
    source: Remembering,
    pieces: Mapping[str, np.ndarray],
    views: Sequence[UInt8[np.ndarray, "b side side 3"]],
    texts: Sequence[str],
) -> Iterator[Shown]:
    """Yields the rows of one load of a `Loader` over `source`. pieces: the result of the load.
    views: its pictures after photometry. texts: the kinds of its texts."""
    names: dict[int | None, str] = dict(enumerate(source.classes))
    for i, (row, bad) in enumerate(zip(pieces["row"].tolist(), pieces["bad"].tolist())):
        example = source.seen[row]
        label = names.get(example.label, example.label)
        yield Shown(
            row=row,
            key=example.key,
            pixels=pictures.decode(example),
            captions=example.texts,
            label=None if label is None else str(label),
            views=[view[i] for view in views],
            texts=list(map(Text, texts, pieces["text"][i])),
            bad=["{key}: {reason}".format(**one) for one in json.loads(bad or "[]")],
        )


def describe(scale: tuple[float, float] | None, flip: bool, photometry: Any) -> str:
    """The augmentation of a picture view, in words."""
    parts = ["the centre, as evaluation sees it"]
    if scale:
        parts = [f"a crop of {scale[0]:.0%} to {scale[1]:.0%} of the area"]
    parts += ["mirrored half of the time"] * flip
    for name, words in (
        ("jitter", "colours jittered"),
        ("grey", "grey"),
        ("blur", "blurred"),
        ("solarise", "solarised"),
    ):
        if probability := getattr(photometry, name):
            parts.append(f"{words} ({probability:.0%})")
    return ", ".join(parts)


class _Picture(NamedTuple):
    uri: str
    size: str  # width × height


class _Tokens(NamedTuple):
    """One text up to its end mark."""

    kind: str
    used: int  # number of its tokens
    room: int  # the most tokens that a text can have
    full: bool
    pieces: Sequence[tuple[int, str, bool]]  # (id, decoded text, whether it is a mark)


class _Card(NamedTuple):
    """One row, formatted for the page."""

    row: str
    key: str
    label: str | None
    bad: Sequence[str]
    source: _Picture
    views: Sequence[_Picture]
    captions: Sequence[tuple[str, bool]]  # (caption, whether a text view shows it)
    texts: Sequence[_Tokens]


def page(
    title: str,
    facts: Sequence[tuple[str, str]],
    notes: Sequence[tuple[str, str]],
    rows: Sequence[Shown],
    tokenizer: Tokenizer,
) -> str:
    """The page as self-contained HTML. facts: (value, label). notes: (name of a view, its
    augmentation). Raises `RunError` without jinja2."""
    cards = [_card(row, tokenizer) for row in rows]
    return render("preview.html", title=title, facts=facts, notes=notes, cards=cards)


def _card(shown: Shown, tokenizer: Tokenizer) -> _Card:
    used = {tuple(text.ids.tolist()) for text in shown.texts}
    ids_of_captions = tokenizer(shown.captions)
    return _Card(
        row=f"{shown.row:,}",
        key=shown.key,
        label=shown.label,
        bad=shown.bad,
        source=_Picture(_jpeg(shown.pixels), _size(shown.pixels)),
        views=[_Picture(_png(view), _size(view)) for view in shown.views],
        captions=[
            (caption, tuple(ids.tolist()) in used)
            for caption, ids in zip(shown.captions, ids_of_captions)
        ],
        texts=[_tokens(text, tokenizer) for text in shown.texts],
    )


def _tokens(text: Text, tokenizer: Tokenizer) -> _Tokens:
    ids = text.ids.tolist()
    end = ids.index(tokenizer.eot_id) + 1 if tokenizer.eot_id in ids else len(ids)
    marks = {tokenizer.sot_id: "start", tokenizer.eot_id: "end"}
    pieces = [(i, marks.get(i) or tokenizer.decode([i]) or "·", i in marks) for i in ids[:end]]
    return _Tokens(text.kind, end, len(ids), end == len(ids), pieces)


def _size(pixels: UInt8[np.ndarray, "h w 3"]) -> str:
    height, width = pixels.shape[:2]
    return f"{width} × {height}"


def _jpeg(pixels: UInt8[np.ndarray, "h w 3"]) -> str:
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    picture.thumbnail((_SIDE, _SIDE))
    return _uri(picture, "jpeg", quality=88)


def _png(pixels: UInt8[np.ndarray, "h w 3"]) -> str:
    """A lossless image: every pixel is what the model receives."""
    return _uri(Image.fromarray(np.ascontiguousarray(pixels)), "png", optimize=True)


def _uri(picture: Image.Image, kind: str, **options: Any) -> str:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return f"data:image/{kind};base64," + base64.b64encode(file.getvalue()).decode()
