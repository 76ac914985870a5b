"""What a folder or a tar holds, by the names of its files."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import glob
import itertools
import os
import re
import tarfile
from collections.abc import Sequence
from typing import Any

from clipx.config import reading, regular
from clipx.data import tars
from clipx.data.tables.cells import PICTURE_ENDS
from clipx.data.tables.formats import ENDS
from clipx.errors import DataError

TRAIN = ("train", "training")
TEST = ("test", "testing", "validation", "valid", "val", "dev")
_SPLIT = re.compile(rf"(?:^|[^a-z])({'|'.join((*TRAIN, *TEST))})(?:$|[^a-z])")
TEXT_ENDS = (".txt", ".json")
MOST_FILES = 50_000  # files to look at
_MEMBERS = 500  # headers of a tar to read
_SHOWN = 6  # kinds of files to list


@dataclasses.dataclass(frozen=True)
class Folder:
    """What a folder and the folders in it hold, by relative name."""

    root: str
    files: list[str]  # sorted
    hidden: list[str]  # files whose name starts with a dot
    folders: list[str]  # directly inside
    whole: bool  # False: there is more than was looked at

    @classmethod
    def of(cls, root: str, most: int | None = MOST_FILES) -> Folder:
        """Lists at least `most` files, where there are that many; None: all of them.

        Raises `DataError` for a folder that cannot be read.
        """

        def refuse(error: OSError) -> None:
            raise DataError(f"{error.filename}: cannot be read ({error.strerror})")

        files, hidden, folders, whole = [], [], [], True
        for folder, inner, names in os.walk(root, onerror=refuse, followlinks=True):
            inner[:] = sorted(name for name in inner if not name.startswith("."))
            inside = os.path.relpath(folder, root)
            prefix = "" if inside == "." else inside + os.sep
            folders = folders if prefix else list(inner)
            for name in names:
                (hidden if name.startswith(".") else files).append(prefix + name)
            if most is not None and len(files) > most:
                whole = False
                break
        return cls(root, sorted(files), hidden, folders, whole)

    def ending(self, ends: tuple[str, ...]) -> list[str]:
        """The files with one of these endings."""
        return [name for name in self.files if name.lower().endswith(ends)]

    def table(self, name: str) -> bool:
        """Whether a file may be a table: by its ending, and if it is not the text of a picture."""
        stem, end = os.path.splitext(name)
        of_picture = end.lower() in TEXT_ENDS and stem in self._pictures
        return name.lower().endswith(ENDS) and not of_picture

    def tops(self) -> tuple[str, str]:
        """The two folders that have all pictures, and all texts; '' and '' if they lie together."""
        pictures, texts = self._pictures, self._texts
        if pictures & texts:
            return "", ""
        tops = [
            {name.partition(os.sep)[0] for name in stems if os.sep in name}
            for stems in (pictures, texts)
        ]
        if any(len(top) != 1 for top in tops):
            return "", ""
        images, beside = (top.pop() for top in tops)
        return (images + os.sep, beside + os.sep) if images != beside else ("", "")

    def pairs(self) -> int:
        """How many pictures have a .txt or a .json of the same name, here or in a folder beside."""
        images, beside = self.tops()
        texts = self._texts
        moved = (beside + name[len(images) :] for name in self._pictures)
        return sum(name in texts for name in moved)

    def class_folders(self) -> bool:
        """Whether pictures lie in several folders."""
        return len({os.path.dirname(name) for name in self._pictures}) > 1

    def describe(self) -> str:
        """What there is, in words."""
        ends = collections.Counter(os.path.splitext(n)[1].lower() or n for n in self.files)
        listed = ", ".join(f"{count:,} {end}" for end, count in ends.most_common(_SHOWN))
        more = f" and {len(ends) - _SHOWN} more kinds" * (len(ends) > _SHOWN)
        first = f" (such as {self.files[0]})" * bool(self.files[:1]) if self.files else ""
        return f"found {listed or 'nothing'}{more}{first}{'' if self.whole else ' and more'}"

    @functools.cached_property
    def _pictures(self) -> frozenset[str]:
        """The pictures, without their endings."""
        return frozenset(os.path.splitext(name)[0] for name in self.ending(PICTURE_ENDS))

    @functools.cached_property
    def _texts(self) -> frozenset[str]:
        """The files that may have captions, without their endings."""
        return frozenset(os.path.splitext(name)[0] for name in self.ending(TEXT_ENDS))


def class_folders_in(path: str) -> bool:
    """Whether a tar has pictures in several folders, and no captions or labels."""
    ends, folders = set(), set()
    with (
        contextlib.suppress(tarfile.TarError, OSError),
        open(path, "rb", opener=regular.only) as file,
    ):
        for member in itertools.islice(tars.headers(file), _MEMBERS):
            if member.isfile():
                end = member.name.lower().rpartition(".")[2]
                ends.add(end)
                if f".{end}" in PICTURE_ENDS:
                    folders.add(os.path.dirname(member.name))
    return len(folders) > 1 and not ends & {"txt", "json", "cls"}


def split_of(name: str) -> str:
    """The split in a file's or a folder's name; '' without one."""
    found = _SPLIT.search(re.sub(r"\d+", " ", name.lower()))
    return found[1] if found else ""


def others(name: str, names: Sequence[str]) -> str:
    """A name that is taken, and those of `names` that are not."""
    rest = ", ".join(other for other in names if other != name)
    return f"{name}; not taken: {rest}" if rest else name


def written(path: str, kept: Sequence[str], names: Sequence[str]) -> str | list[str]:
    """How a config names the files `kept` of a folder: a path, a glob that matches no other of
    `names`, or a list. `path`: the folder as the config has it."""
    if len(kept) == 1:
        return os.path.join(path, kept[0])
    folder, end = os.path.dirname(kept[0]), os.path.splitext(kept[0])[1]
    for start in (os.path.join(folder, ""), os.path.commonprefix(list(kept))):
        fits = [n for n in names if n.startswith(start) and n.endswith(end)]
        fits = [n for n in fits if os.path.dirname(n) == folder]
        if sorted(fits) == sorted(kept):
            return os.path.join(path, f"{glob.escape(start)}*{end}")
    return [os.path.join(path, name) for name in kept]


def read_json(path: str) -> Any:
    """The value of a json file; None if there is none that can be read."""
    try:
        return reading.read_json(path)
    except (OSError, ValueError):
        return None
