"""What a table does not say about itself, found from its first rows: which columns hold pictures
and captions, and the folder to which the paths are relative. Where that fails, the error says what
there is, what is the best guess, and how to spell it in a config."""

from __future__ import annotations

import contextlib
import difflib
import itertools
import os
import re
import shlex
from collections.abc import Sequence
from typing import NamedTuple

from clipx.data.base import expand_user
from clipx.data.tables.formats import PICTURE_ENDS, File, strings
from clipx.errors import DataError

_LOOKED_AT = 100  # rows
_MOST_FOLDERS = 100  # beside a table, in which its pictures may lie
_IMAGES = (  # the likeliest first
    *("filepath", "image_path", "img_path", "imagepath", "filename", "file_name", "image"),
    *("image_name", "image_file", "img", "path", "file", "picture", "photo"),
)
_CAPTIONS = (
    *("caption", "captions", "text", "texts", "title", "sentence", "sentences", "description"),
    *("raw", "comment", "alt_text", "alt"),
)
_NUMBERED = re.compile(rf"({'|'.join(_CAPTIONS)})[ _-]?\d+")  # caption_0, caption_1, ...
_FETCH = "fetch them first, such as with img2dataset, whose shards the source webdataset reads"


class Layout(NamedTuple):
    """Which columns of a table are read."""

    image: str
    captions: tuple[str, ...]


def layout(
    file: File, *, image: str, captions: Sequence[str], label: str = "", where: str = ""
) -> Layout:
    """The columns of the picture and of the captions: those given, else those found. A table with
    labels needs no captions. Raises `DataError` for a column that is not there, and where nothing
    in the table looks like what is missing."""
    rows = [cells for _, cells in itertools.islice(file.rows(file.columns), _LOOKED_AT)]
    columns = [_Column(name, [row[i] for row in rows]) for i, name in enumerate(file.columns)]
    asked = [("image", image), *(("captions", c) for c in captions)]
    for key, name in (*asked, ("label", label), ("where", where)):
        if name and file.columns.count(name) != 1:
            raise _missing(file, columns, key, name)
    pictures = sorted(columns, key=_Column.as_picture, reverse=True)
    if not image:
        sure = [c for c in pictures if c.ends >= 0.5]
        if not sure:  # paths without an ending, then
            folders = _folders(file.path)
            sure = [c for c in pictures if _count(folders, c.texts[:10])[0]]
        if not sure:
            reason = "no column that looks like paths of pictures"
            links = [c.name for c in pictures if c.links >= 0.5]
            if links:
                reason += f" ({links[0]} has addresses; {_FETCH})"
            raise _failure(file, columns, reason, _guesses(columns))
        image = sure[0].name
    if not captions:
        others = [c for c in columns if c.name not in (image, label, where)]
        others.sort(key=_Column.as_caption, reverse=True)
        sure = [c.name for c in others if c.is_caption(by_name=bool(label))]
        if not sure and not label:
            reason = "no column that looks like captions"
            raise _failure(file, columns, reason, _guesses(columns, image))
        captions = _numbered_like(sure[0], file.columns) if sure else ()
    return Layout(image, tuple(captions))


def _numbered_like(name: str, columns: Sequence[str]) -> list[str]:
    """All of caption_0, caption_1, ... for one of them; else the column alone."""
    stem = _NUMBERED.fullmatch(name.lower())
    if not stem:
        return [name]
    found = ((column, _NUMBERED.fullmatch(column.lower())) for column in columns)
    return [column for column, match in found if match and match[1] == stem[1]]


class _Column:
    """A column's first cells, and how much it looks like one thing or another."""

    def __init__(self, name: str, cells: list):
        self.name, self.plain = name, name.lower()
        self.cells = [cell for cell in cells if cell not in (None, "")]
        self.texts = [text for cell in self.cells for text in strings(cell) or () if text]
        count = max(len(self.texts), 1)
        self.links = sum("://" in text for text in self.texts) / count
        self.ends = (
            sum(text.lower().endswith(PICTURE_ENDS) and "://" not in text for text in self.texts)
            / count
        )  # share that ends as pictures do
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
    """2 for one of `names`, a little less for later ones; 0.5 for a name with one inside."""
    if name in names:
        return 2 - names.index(name) / 100
    return 0.5 * any(len(one) > 2 and one in name for one in names)


def _guesses(columns: list[_Column], image: str = "") -> dict[str, list[str]]:
    """The two best columns for the picture, `image` where that is known, and for captions."""
    pictures = sorted(columns, key=_Column.as_picture, reverse=True)
    known = [image] if image else [c.name for c in pictures[:2]]
    captions = sorted(columns, key=_Column.as_caption, reverse=True)
    return {"image": known, "captions": [c.name for c in captions if c.name != known[0]][:2]}


def _missing(file: File, columns: list[_Column], key: str, name: str) -> DataError:
    """What to say of a column that is asked for and is not there, or is there twice."""
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
    """The columns found, the best guesses for each thing, and the words for a command."""
    more = f" and {len(columns) - 12} more" if len(columns) > 12 else ""
    parts = [f"{reason}; columns found: {', '.join(map(str, columns[:12]))}{more}"]
    guesses = {key: names for key, names in guesses.items() if names}
    if guesses:
        best = (f"{key}: {' or '.join(names)}" for key, names in guesses.items())
        parts.append("best guesses for " + ", for ".join(best))
        tail = {"where": "=VALUE"}
        words = (flag(key, names[0] + tail.get(key, "")) for key, names in guesses.items())
        parts.append("set " + " ".join(words))
    return DataError(f"{file.path}: {'; '.join(parts)}")


def flag(key: str, value: str) -> str:
    """What to add to a command so that config.data.<key> is `value`."""
    return f"--config.data.{key}={shlex.quote(value)}"


def root(table: str, given: str, paths: Sequence[str]) -> str:
    """The folder to which `paths`, the first of a table, are relative: `given`, or of the places
    where pictures lie the one with most of them. Raises `DataError` where none is there."""
    paths = list(dict.fromkeys(paths))
    given_folder = expand_user(given)
    if not paths:  # no row has one: that is told of each row, when it is read
        return given_folder
    links = [path for path in paths if "://" in path]
    if links:
        raise DataError(f"{table}: addresses ({links[0]}), expected paths of pictures; {_FETCH}")
    folders = _folders(table)
    found, best = _count([given_folder] if given else folders, paths)
    if found:
        return best
    tried = [given_folder] if given else [folder or "as written" for folder in folders]
    more = f" and {len(tried) - 8} more" if len(tried) > 8 else ""
    elsewhere, best = _count(folders, paths)
    fix = flag("root", best if best else ".") if elsewhere else "--config.data.root=FOLDER"
    raise DataError(
        f"{table}: none of the first {len(paths)} pictures is there; the first path tried is "
        f"{os.path.join(tried[0] if given else '', paths[0])}; roots tried: "
        f"{', '.join(tried[:8])}{more}; set {fix}"
    )


def _folders(table: str) -> list[str]:
    """Where the pictures of a table may lie, the likeliest first; '' is for paths as written."""
    folder = os.path.dirname(os.path.abspath(table))
    names = []
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        names = [e.name for e in entries if e.is_dir() and not e.name.startswith(".")]
    names.sort(key=lambda name: (name.lower() != "images", name))
    return ["", folder, *(os.path.join(folder, name) for name in names[:_MOST_FOLDERS])]


def _count(folders: Sequence[str], paths: Sequence[str]) -> tuple[int, str]:
    """How many of `paths` are files in the folder with most of them, the first of such, and it."""
    most, best = 0, ""
    for folder in folders:
        count = sum(os.path.isfile(os.path.join(folder, path)) for path in paths)
        if count > most:
            most, best = count, folder
        if most == len(paths):
            break
    return most, best
