"""Finds the files that the paths of a table mean: their folder, and how they are spelt."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import re
import urllib.parse
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from clipx.data.base import expand_user
from clipx.data.tables.cells import NUMBERED, PICTURE_ENDS
from clipx.errors import DataError, data_flag, listed

_MOST_FOLDERS = 100  # folders beside a table to search for its pictures
_TRIED = 20  # paths with which to try unusual spellings
_DEEPEST = 8  # folders to leave out at the start of a path
DOWNLOAD = (
    "download them first, for example with img2dataset, whose shards the source webdataset reads"
)


class Spelling(NamedTuple):
    """How the paths of a table become files. The default takes them as they are written."""

    root: str = ""  # the folder to which they are relative
    numbered: bool = False  # a caption's number, #0, ends them
    windows: bool = False  # backslashes separate folders, and a drive may begin them
    dropped: int = 0  # leading folders that are left out
    endings: bool = False  # files of `root` complete them with an ending

    def path(self, written: str) -> str:
        """The path of a picture, relative to `root`."""
        path = written
        if path.startswith("file://"):
            path = urllib.parse.unquote(urllib.parse.urlsplit(path).path)
        if self.numbered:
            path = NUMBERED.sub("", path)
        if self.windows:
            path = re.sub(r"^[A-Za-z]:", "", path).replace("\\", "/")
        if self.dropped:
            parts = path.split("/")
            path = "/".join(parts[min(self.dropped, len(parts) - 1) :])
        return self._complete(path) if self.endings else path

    def exists(self, written: str) -> bool:
        return os.path.isfile(os.path.join(self.root, self.path(written)))

    def changes(self, written: str) -> bool:
        """Whether the file has another path than the table says."""
        return self.path(written) != written

    def _complete(self, path: str) -> str:
        folder, name = os.path.split(path)
        found = _by_stem(os.path.join(self.root, folder)).get(name, ())
        if len(found) > 1:
            raise DataError(
                f"{os.path.join(self.root, path)}: {' and '.join(found)} have this name, expected "
                "one picture; write the ending into the table"
            )
        return os.path.join(folder, found[0]) if found else path


@functools.lru_cache(maxsize=128)  # `find` clears it: folders change
def _by_stem(folder: str) -> dict[str, tuple[str, ...]]:
    """The pictures of a folder by their names without the ending."""
    stems: dict[str, tuple[str, ...]] = {}
    with contextlib.suppress(OSError):
        for name in sorted(os.listdir(folder or ".")):
            stem, end = os.path.splitext(name)
            if end.lower() in PICTURE_ENDS:
                stems[stem] = (*stems.get(stem, ()), name)
    return stems


def find(table: str, given: str, paths: Sequence[str]) -> Spelling:
    """The folder to which the paths of a table are relative, and how they are spelt.

    paths: the first paths of the table.
    given: the folder that the config names; '' searches the usual places for most of `paths`.

    Raises `DataError` if none of the pictures exists.
    """
    _by_stem.cache_clear()
    paths = list(dict.fromkeys(paths))
    given_folder = expand_user(given)
    if not paths:  # rows without a path are reported when they are read
        return Spelling(given_folder)
    links = [path for path in paths if "://" in path and not path.startswith("file://")]
    if links:
        raise DataError(f"{table}: URLs ({links[0]}), expected paths of pictures; {DOWNLOAD}")
    near, far = folders(table)
    spelling = best([given_folder] if given else near, paths)
    if spelling is None and not given:
        spelling = best(far, paths, unusual=False)
    if spelling is not None:
        return spelling
    tried = [given_folder] if given else [folder or "as written" for folder in near + far]
    elsewhere = best([*near, *far], paths) if given else None
    fix = "name the folder that holds them: --config.data.root=FOLDER"
    if elsewhere is not None:
        fix = f"set {data_flag('root', elsewhere.root or '.')}"
    raise DataError(
        f"{table}: none of the first {len(paths)} pictures exists; the first path tried is "
        f"{os.path.join(tried[0] if given else '', paths[0])}; roots tried: "
        f"{listed(tried)}; {fix}"
    )


def folders(table: str) -> tuple[list[str], list[str]]:
    """(folders that may contain the pictures of a table, likeliest first, those farther away); ''
    means the paths as they are written."""
    folder = os.path.dirname(os.path.abspath(table))
    above = os.path.dirname(folder)
    far = [above, *(each for each in _inside(above) if each != folder)]
    return ["", folder, *_inside(folder)], far


def _inside(folder: str) -> list[str]:
    names = []
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        names = [e.name for e in entries if e.is_dir() and not e.name.startswith(".")]
    names.sort(key=lambda name: (name.lower() != "images", name))
    return [os.path.join(folder, name) for name in names[:_MOST_FOLDERS]]


def best(roots: Sequence[str], paths: Sequence[str], *, unusual: bool = True) -> Spelling | None:
    """The spelling and the folder in which most of `paths` exist; None if none does.

    unusual: whether to try other spellings where most paths do not exist as they are written.
    """
    count, spelling = _most((Spelling(root) for root in roots), paths)
    if unusual and count * 2 < len(paths):
        few = paths[:_TRIED]
        as_written = sum(map(spelling.exists, few)) if count else 0
        more, other = _most(_unusual(roots, few), few)
        if more > as_written:
            return other
    return spelling if count else None


def _unusual(roots: Sequence[str], paths: Sequence[str]) -> Iterator[Spelling]:
    """Other spellings that could fit `paths`, likeliest first."""
    numbered = sorted({False, any(map(NUMBERED.search, paths))})
    windows = sorted({False, any("\\" in path or path[1:2] == ":" for path in paths)})
    depth = max(path.count("/") + path.count("\\") for path in paths)
    dropped = range(min(depth, _DEEPEST) + 1)
    for endings, drop in itertools.product((False, True), dropped):
        for number, slash, root in itertools.product(numbered, windows, roots):
            yield Spelling(root, number, slash, drop, endings)


def _most(spellings: Iterator[Spelling], paths: Sequence[str]) -> tuple[int, Spelling]:
    """(number of `paths` that exist in the best spelling, that spelling)."""
    most, found = 0, Spelling()
    for spelling in spellings:
        count = sum(map(spelling.exists, paths))
        if count > most:
            most, found = count, spelling
        if most == len(paths):
            break
    return most, found


def normal(path: str) -> str:
    """A path with one spelling, so that all rows of one picture have the same."""
    longer = "./" in path or ("//" in path and "://" not in path)
    return os.path.normpath(path) if longer else path
