"""Infers the layout of a table from its first rows: the columns of pictures and captions, and the
folder to which the paths are relative.

If that fails, the error lists what the table has, the best guesses, and the flags that set them.
"""

from __future__ import annotations

import contextlib
import difflib
import itertools
import os
import re
import shlex
from collections.abc import Sequence
from typing import Any, NamedTuple

from clipx.data.base import expand_user
from clipx.data.tables.formats import PICTURE_ENDS, File, strings
from clipx.errors import DataError

_LOOKED_AT = 100  # rows from which to infer
_MOST_FOLDERS = 100  # folders beside a table to search for its pictures
_IMAGES = (  # usual names of the column, likeliest first
    *("filepath", "image_path", "img_path", "imagepath", "filename", "file_name", "image"),
    *("image_name", "image_file", "img", "path", "file", "picture", "photo"),
)
_CAPTIONS = (
    *("caption", "captions", "text", "texts", "title", "sentence", "sentences", "description"),
    *("raw", "comment", "alt_text", "alt"),
)
_NUMBERED = re.compile(rf"({'|'.join(_CAPTIONS)})[ _-]?\d+")  # caption_0, caption_1, ...
_DOWNLOAD = (
    "download them first, for example with img2dataset, whose shards the source webdataset reads"
)


class Layout(NamedTuple):
    """The columns of a table to read."""

    image: str
    captions: tuple[str, ...]


def layout(
    file: File, *, image: str, captions: Sequence[str], label: str = "", where: str = ""
) -> Layout:
    """The columns of pictures and captions: those given, else inferred ones.

    A table with labels needs no captions. Raises `DataError` if a given column does not exist or
    exists twice, and if no column looks like the one to infer.
    """
    rows = [cells for _, cells in itertools.islice(file.rows(file.columns), _LOOKED_AT)]
    columns = [_Column(name, [row[i] for row in rows]) for i, name in enumerate(file.columns)]
    given = [("image", image), *(("captions", c) for c in captions)]
    for key, name in (*given, ("label", label), ("where", where)):
        if name and file.columns.count(name) != 1:
            raise _missing(file, columns, key, name)
    pictures = sorted(columns, key=_Column.as_picture, reverse=True)
    if not image:
        candidates = [c for c in pictures if c.ends >= 0.5]
        if not candidates:  # the paths may have no file extension
            folders = _folders(file.path)
            candidates = [c for c in pictures if _count(folders, c.texts[:10])[0]]
        if not candidates:
            reason = "no column that looks like paths of pictures"
            links = [c.name for c in pictures if c.links >= 0.5]
            if links:
                reason += f" ({links[0]} has URLs; {_DOWNLOAD})"
            raise _failure(file, columns, reason, _guesses(columns))
        image = candidates[0].name
    if not captions:
        others = [c for c in columns if c.name not in (image, label, where)]
        others.sort(key=_Column.as_caption, reverse=True)
        names = [c.name for c in others if c.is_caption(by_name=bool(label))]
        if not names and not label:
            reason = "no column that looks like captions"
            raise _failure(file, columns, reason, _guesses(columns, image))
        captions = _numbered_like(names[0], file.columns) if names else ()
    return Layout(image, tuple(captions))


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
        self.texts = [text for cell in self.cells for text in strings(cell) or () if text]
        count = max(len(self.texts), 1)
        self.links = sum("://" in text for text in self.texts) / count
        self.ends = (
            sum(text.lower().endswith(PICTURE_ENDS) and "://" not in text for text in self.texts)
            / count
        )  # share of paths with the extension of a picture
        self.words = sum(" " in text or not text.isascii() for text in self.texts) / count
        self.length = sum(map(len, self.texts)) / count

    def as_picture(self) -> float:
        return 4 * self.ends - 3 * self.links + _named(self.plain, _IMAGES) - self.words

    def as_caption(self) -> float:
        named = 2 * _named(self.plain, _CAPTIONS)
        if _NUMBERED.fullmatch(self.plain):
            named = 3.0
        return named - 4 * max(self.ends, self.links) + self.words + min(self.length / 1000, 0.9)

    def is_caption(self, *, by_name: bool) -> bool:
        named = self.plain in _CAPTIONS or bool(_NUMBERED.fullmatch(self.plain))
        fits = max(self.ends, self.links) < 0.5 and bool(self.texts)
        return fits and (named or (self.words >= 0.5 and not by_name))

    def __str__(self) -> str:
        if self.texts:
            text = self.texts[0].replace("\n", " ")
            return f"{self.name} ({text[:30]}{'...' * (len(text) > 30)})"
        return f"{self.name} ({type(self.cells[0]).__name__ if self.cells else 'empty'})"


def _named(name: str, names: tuple[str, ...]) -> float:
    """2 if `name` is the first of `names`, a little less for later ones, 0.5 if it contains one."""
    if name in names:
        return 2 - names.index(name) / 100
    return 0.5 * any(len(one) > 2 and one in name for one in names)


def _guesses(columns: list[_Column], image: str = "") -> dict[str, list[str]]:
    """The two best columns for pictures (or the given `image`) and the two best for captions."""
    ranked = sorted(columns, key=_Column.as_picture, reverse=True)
    images = [image] if image else [c.name for c in ranked[:2]]
    captions = sorted(columns, key=_Column.as_caption, reverse=True)
    return {"image": images, "captions": [c.name for c in captions if c.name != images[0]][:2]}


def _missing(file: File, columns: list[_Column], key: str, name: str) -> DataError:
    """The error for a given column that does not exist, or exists twice."""
    near = difflib.get_close_matches(name, [c for c in file.columns if c != name], 2, cutoff=0.5)
    guesses = _guesses(columns) if key in ("image", "captions") else {}
    if near or key in guesses:
        guesses[key] = [*near, *(n for n in guesses.get(key, ()) if n not in near)][:2]
    count = file.columns.count(name)
    times = f"{count} columns have that name" if count else "no column has that name"
    return _failure(file, columns, f"{key}={name!r}, but {times}", guesses)


def _failure(
    file: File, columns: list[_Column], reason: str, guesses: dict[str, list[str]]
) -> DataError:
    """An error that lists the columns, the best guesses for each key, and the flags to set them."""
    more = f" and {len(columns) - 12} more" if len(columns) > 12 else ""
    parts = [f"{reason}; columns found: {', '.join(map(str, columns[:12]))}{more}"]
    guesses = {key: names for key, names in guesses.items() if names}
    if guesses:
        best = (f"{key}: {' or '.join(names)}" for key, names in guesses.items())
        parts.append("best guesses for " + ", for ".join(best))
        tail = {"where": "=VALUE"}
        flags = (flag(key, names[0] + tail.get(key, "")) for key, names in guesses.items())
        parts.append("set " + " ".join(flags))
    return DataError(f"{file.path}: {'; '.join(parts)}")


def flag(key: str, value: str) -> str:
    """The command-line flag that sets config.data.<key> to `value`."""
    return f"--config.data.{key}={shlex.quote(value)}"


def root(table: str, given: str, paths: Sequence[str]) -> str:
    """The folder to which the paths of a table are relative.

    paths: the first paths of the table.
    given: the folder that the config names; '' searches the usual places for most of `paths`.

    Raises `DataError` if none of the pictures exists.
    """
    paths = list(dict.fromkeys(paths))
    given_folder = expand_user(given)
    if not paths:  # rows without a path are reported when they are read
        return given_folder
    links = [path for path in paths if "://" in path]
    if links:
        raise DataError(f"{table}: URLs ({links[0]}), expected paths of pictures; {_DOWNLOAD}")
    folders = _folders(table)
    count, best = _count([given_folder] if given else folders, paths)
    if count:
        return best
    tried = [given_folder] if given else [folder or "as written" for folder in folders]
    more = f" and {len(tried) - 8} more" if len(tried) > 8 else ""
    elsewhere, best = _count(folders, paths)
    fix = flag("root", best if best else ".") if elsewhere else "--config.data.root=FOLDER"
    raise DataError(
        f"{table}: none of the first {len(paths)} pictures exists; the first path tried is "
        f"{os.path.join(tried[0] if given else '', paths[0])}; roots tried: "
        f"{', '.join(tried[:8])}{more}; set {fix}"
    )


def _folders(table: str) -> list[str]:
    """Folders that may contain the pictures of a table, likeliest first; '' means the paths as
    they are written."""
    folder = os.path.dirname(os.path.abspath(table))
    names = []
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        names = [e.name for e in entries if e.is_dir() and not e.name.startswith(".")]
    names.sort(key=lambda name: (name.lower() != "images", name))
    return ["", folder, *(os.path.join(folder, name) for name in names[:_MOST_FOLDERS])]


def _count(folders: Sequence[str], paths: Sequence[str]) -> tuple[int, str]:
    """Returns (number of `paths` that exist in the best folder, that folder)."""
    most, best = 0, ""
    for folder in folders:
        count = sum(os.path.isfile(os.path.join(folder, path)) for path in paths)
        if count > most:
            most, best = count, folder
        if most == len(paths):
            break
    return most, best
