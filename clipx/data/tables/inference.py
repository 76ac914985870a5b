"""Infers the layout of a table from its first rows: the columns of pictures and captions.

If that fails, the error lists what the table has, the columns that fit, and the flags that set
them.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from clipx.data.base import Guess, expand_user
from clipx.data.tables import paths
from clipx.data.tables.cells import brief, has_picture_end, strings
from clipx.data.tables.columnar import holds_pictures
from clipx.data.tables.formats import File
from clipx.errors import DataError, data_flag, listed

_LOOKED_AT = 100  # rows from which to infer
_TRIED = 10  # paths of a column to look for
_IMAGES = (  # usual names of the column, likeliest first
    *("filepath", "image_path", "img_path", "imagepath", "filename", "file_name", "image"),
    *("image_name", "image_file", "img", "path", "file", "picture", "photo", "jpg", "png"),
)
# Usual names of the column. Those of an earlier line are taken before those of a later one; of two
# on one line nobody can say which is meant.
_CAPTIONS = (
    ("caption",),
    ("captions",),
    ("text", "texts", "sentence", "sentences"),
    ("title", "description", "raw", "comment", "alt_text", "alt"),
)
_NAMES = tuple(itertools.chain.from_iterable(_CAPTIONS))
_NUMBERED = re.compile(rf"({'|'.join(_NAMES)})[ _-]?\d+")  # caption_0, caption_1, ...
_BY_CONTENT = len(_CAPTIONS)


class Layout(NamedTuple):
    """The columns of a table to read."""

    image: str
    captions: tuple[str, ...]
    inside: bool = False  # the cells of `image` are pictures, not paths
    guesses: tuple[Guess, ...] = ()  # what was inferred


def layout(
    file: File,
    *,
    image: str,
    captions: Sequence[str],
    label: str = "",
    where: str = "",
    root: str = "",
) -> Layout:
    """The columns of pictures and captions: those given, else inferred ones.

    A table with labels needs no captions. Raises `DataError` if a given column does not exist or
    exists twice, if no column looks like the one to infer, and if several do.
    """
    rows = [cells for _, cells in itertools.islice(file.rows(file.columns), _LOOKED_AT)]
    columns = [_Column(name, [row[i] for row in rows]) for i, name in enumerate(file.columns)]
    given = [("image", image), *(("captions", c) for c in captions)]
    for key, name in (*given, ("label", label), ("where", where)):
        if name and file.columns.count(name) != 1:
            raise _missing(file, columns, key, name)
    guesses = []
    if not image:
        image, reason = _picture_column(file, columns, root)
        guesses.append(Guess("image", image, reason))
    if not captions:
        captions, reason = _caption_columns(file, columns, image, label, where)
        if captions:
            guesses.append(Guess("captions", list(captions), reason))
    inside = any(c.inside for c in columns if c.name == image)
    return Layout(image, tuple(captions), inside, tuple(guesses))


def _picture_column(file: File, columns: list[_Column], root: str) -> tuple[str, str]:
    """(the column of pictures, why). root: where its paths start, if the config says so."""
    if inside := [c for c in columns if c.inside]:
        inside.sort(key=_Column.as_picture, reverse=True)
        if len(inside) > 1 and _rank(inside[0].plain) == _rank(inside[1].plain):
            raise _several(file, "image", inside)
        return inside[0].name, "the column whose cells are pictures"
    ranked = sorted(columns, key=_Column.as_picture, reverse=True)
    fitting = [c for c in ranked if c.ends >= 0.5]
    near, far = ([expand_user(root)], []) if root else paths.folders(file.path)
    if fitting:
        # of several columns with paths, the first whose pictures exist
        found = fitting[1:] and [c for c in fitting if _exists(c, near)]
        best = (found or fitting)[0]
        alike = [c for c in found or fitting if _rank(c.plain) == _rank(best.plain)]
        if len(alike) > 1 and any(c.texts != best.texts for c in alike):
            raise _several(file, "image", alike)
        return best.name, "a column of paths of pictures"
    # the paths may have no ending
    for folders, unusual in ((near, False), (far, False), (near, True)):
        for column in ranked:
            if column.links < 0.5 and _exists(column, folders, unusual=unusual):
                return column.name, "a column of names of pictures that exist"
    reason = "no column that looks like paths of pictures"
    if links := [c.name for c in ranked if c.links >= 0.5]:
        reason += f" ({links[0]} has URLs; {paths.DOWNLOAD})"
    raise _failure(file, columns, reason, {})


def _exists(column: _Column, folders: Sequence[str], *, unusual: bool = True) -> bool:
    """Whether one of the folders has pictures that the first cells name: any as it is written, or
    half of them in an unusual spelling."""
    texts = list(dict.fromkeys(column.texts))[:_TRIED]
    spelling = paths.best(folders, texts, unusual=unusual) if texts else None
    if spelling is None or not any(map(spelling.changes, texts)):
        return spelling is not None
    return sum(map(spelling.exists, texts)) * 2 >= len(texts)


def _caption_columns(
    file: File, columns: list[_Column], image: str, label: str, where: str
) -> tuple[tuple[str, ...], str]:
    """(the columns of captions, why). A table with labels may have none."""
    others = [c for c in columns if c.name not in (image, label, where)]
    fitting = [c for c in others if c.is_caption(by_name=bool(label))]
    if not fitting:
        if label:
            return (), ""
        reason, fits = "no column that looks like captions", _fitting(others, image)
        raise _failure(file, columns, reason, fits if fits["captions"] else {})
    fitting.sort(key=_Column.as_caption, reverse=True)
    best = fitting[0]
    names = _numbered_like(best.name, file.columns)
    alike = [c for c in fitting if c.rank == best.rank and c.name not in names]
    if alike and not label:
        raise _several(file, "captions", [best, *alike])
    if len(names) > 1:
        reason = "numbered columns of captions"
    elif best.rank < _BY_CONTENT:
        rest = ", ".join(c.name for c in fitting[1:])
        reason = "named like captions" + f"; not taken: {rest}" * bool(rest)
    else:
        reason = "the only column of words"
    return tuple(names), reason


def _numbered_like(name: str, columns: Sequence[str]) -> list[str]:
    """All of caption_0, caption_1, ... if `name` is one of them; else only `name`."""
    stem = _NUMBERED.fullmatch(name.lower())
    if not stem:
        return [name]
    matches = ((column, _NUMBERED.fullmatch(column.lower())) for column in columns)
    return [column for column, match in matches if match and match[1] == stem[1]]


class _Column:
    """The first cells of a column, and scores of how much it looks like pictures or captions."""

    def __init__(self, name: str, cells: list[Any]):
        self.name, self.plain = name, name.lower()
        self.cells = [cell for cell in cells if cell not in (None, "")]
        self.inside = bool(self.cells) and holds_pictures(self.cells)
        self.texts = [text for cell in self.cells for text in strings(cell) or () if text]
        count = max(len(self.texts), 1)
        links = [t for t in self.texts if "://" in t and not t.startswith("file://")]
        self.links = len(links) / count
        # share of paths with the extension of a picture
        self.ends = sum(map(has_picture_end, set(self.texts).difference(links))) / max(
            len(set(self.texts)), 1
        )
        self.words = sum(" " in text or not text.isascii() for text in self.texts) / count
        self.length = sum(map(len, self.texts)) / count
        self.rank = _caption_rank(self.plain)

    def as_picture(self) -> float:
        return 4 * self.ends - 3 * self.links + _named(self.plain, _IMAGES) - self.words

    def as_caption(self) -> float:
        order = _NAMES.index(self.plain) if self.plain in _NAMES else len(_NAMES)
        return -10 * self.rank - order / 100 + self.words + min(self.length / 1000, 0.9)

    def is_caption(self, *, by_name: bool) -> bool:
        fits = max(self.ends, self.links) < 0.5 and bool(self.texts) and not self.inside
        return fits and (self.rank < _BY_CONTENT or (self.words >= 0.5 and not by_name))

    def may_be_caption(self) -> bool:
        """Whether naming this column is advice that works: it has texts that are no numbers."""
        letters = sum(any(map(str.isalpha, text)) for text in self.texts)
        return (
            max(self.ends, self.links) < 0.5 and not self.inside and letters * 2 > len(self.texts)
        )

    def __str__(self) -> str:
        name = brief(self.name)
        if self.texts:
            text = self.texts[0].replace("\n", " ")
            return f"{name} ({text[:30]}{'...' * (len(text) > 30)})"
        return f"{name} ({type(self.cells[0]).__name__ if self.cells else 'empty'})"


def _caption_rank(name: str) -> float:
    """The line of a name in `_CAPTIONS`; numbered names come after all of them."""
    if _NUMBERED.fullmatch(name):
        return _BY_CONTENT - 0.5
    return next((i for i, names in enumerate(_CAPTIONS) if name in names), _BY_CONTENT)


def _rank(name: str) -> int:
    return 0 if name in _IMAGES else 1


def _named(name: str, names: tuple[str, ...]) -> float:
    """2 if `name` is the first of `names`, a little less for later ones, 0.5 if it contains one."""
    if name in names:
        return 2 - names.index(name) / 100
    return 0.5 * any(len(one) > 2 and one in name for one in names)


def _fitting(columns: Iterable[_Column], image: str = "") -> dict[str, list[str]]:
    """The columns that fit, best first: for pictures (or the given `image`) and for captions."""
    columns = list(columns)
    ranked = sorted(columns, key=_Column.as_picture, reverse=True)
    images = [image] if image else [c.name for c in ranked if c.inside or c.ends >= 0.5]
    captions = sorted(columns, key=_Column.as_caption, reverse=True)
    return {
        "image": images[:2],
        "captions": [c.name for c in captions if c.may_be_caption() and c.name not in images][:2],
    }


def _missing(file: File, columns: list[_Column], key: str, name: str) -> DataError:
    """The error for a given column that does not exist, or exists twice."""
    once = [c for c in file.columns if file.columns.count(c) == 1]
    near = difflib.get_close_matches(name, [c for c in once if c != name], 2, cutoff=0.5)
    guesses = _fitting(columns) if key in ("image", "captions") else {}
    fits = {c.name for c in columns if c.may_be_caption() or key != "captions"}
    if key == "image":
        fits = set(guesses["image"]) or fits
    near = [n for n in near if n in fits]
    if near or key in guesses:
        guesses[key] = [*near, *(n for n in guesses.get(key, ()) if n not in near)][:2]
    guesses = {k: [n for n in names if n in once] for k, names in guesses.items()}
    count = file.columns.count(name)
    times = f"{count} columns have that name" if count else "no column has that name"
    return _failure(file, columns, f"{key}={name!r}, but {times}", guesses)


def _several(file: File, key: str, candidates: Sequence[_Column]) -> DataError:
    """The error for columns of which nobody can say which is meant."""
    what = "the pictures" if key == "image" else "the caption"
    starts = "; ".join(f"{c.name}: {_start(c)}" for c in candidates[:6])
    flags = " or ".join(data_flag(key, c.name) for c in candidates[:6])
    both = ""
    if key == "captions":
        names = ", ".join(repr(c.name) for c in candidates[:6])
        both = f'; for all of them: --config.data.captions="({names})"'
    return DataError(
        f"{file.path}: {len(candidates)} columns could be {what} ({starts}), expected one that is "
        f"named; set {flags}{both}"
    )


def _start(column: _Column) -> str:
    text = column.texts[0].replace("\n", " ") if column.texts else "pictures"
    return f"{text[:40]!r}{'...' * (len(text) > 40)}"


def _failure(
    file: File, columns: list[_Column], reason: str, guesses: dict[str, list[str]]
) -> DataError:
    """An error that lists the columns, those that fit for each key, and the flags to set them."""
    parts = [f"{reason}; columns found: {listed(list(map(str, columns)), 12)}"]
    guesses = {key: names for key, names in guesses.items() if names}
    if guesses:
        best = (f"{key}: {' or '.join(names)}" for key, names in guesses.items())
        parts.append("best guesses for " + ", for ".join(best))
        tail = {"where": "=VALUE"}
        flags = (data_flag(key, names[0] + tail.get(key, "")) for key, names in guesses.items())
        parts.append("set " + " ".join(flags))
    return DataError(f"{file.path}: {'; '.join(parts)}")
