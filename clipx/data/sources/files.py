"""Pictures as files, each with its captions in a file of the same name."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from clipx.data.base import Account, Example, Guess, Source, expand_user, printable
from clipx.data.captions import (
    SAMPLED,
    Lines,
    Member,
    Reader,
    Texts,
    decide,
)
from clipx.data.contents import TEXT_ENDS, Folder
from clipx.data.order import spread
from clipx.data.reading import read_file, stamps
from clipx.data.tables.cells import PICTURE_ENDS
from clipx.data.tars import Tally
from clipx.errors import BadSample, DataError


@dataclasses.dataclass(frozen=True)
class Files(Source):
    """Pictures of a folder and of the folders in it, in the order of their paths.

    The captions of `a/1.jpg` are in `a/1.txt`, or in `a/1.json` (a list `captions` or a string
    `caption`), as img2dataset writes them with `output_format=files`. They may also be in a folder
    beside: those of `images/1.jpg` in `text/1.txt`. Names that start with a dot are ignored.

    Reading an example raises `BadSample` if its picture has no bytes, or if it has no caption. The
    constructor raises `DataError` if there are no pictures, or no captions at all.
    """

    path: str  # a folder
    captions_key: str = "captions"  # key of a list in .json
    caption_key: str = "caption"  # key of a string in .json, used if there is no list
    # which has the captions of a picture that has both; None: .json, unless it has none
    captions_from: Member | None = None
    # whether a .txt is one caption or each line is one; None: each, if all have several lines
    txt_lines: Lines | None = None
    without_captions: bool = False  # rows are pictures alone, to be embedded; texts are not read

    def __post_init__(self) -> None:
        self._root: str
        self._names: bytes  # the paths of all pictures, concatenated
        self._ends: np.ndarray  # the end of each path in `_names`
        self._has: np.ndarray  # bool [rows, 2]: whether there is a .txt, and a .json
        self._stamps: np.ndarray  # int64 [rows, 3, 2]: of the picture, the .txt and the .json
        self._tops: tuple[str, str]  # the folders of pictures and of texts, where they differ
        self._account: Account
        self._reader: Any  # of captions, a `Reader`; None without captions
        self._guesses: tuple[Guess, ...]
        root = expand_user(self.path)
        if not os.path.isdir(root):
            raise DataError(f"{self.path}: no folder, expected one with pictures and their texts")
        inside = Folder.of(root, most=None)
        pictures = inside.ending(PICTURE_ENDS)
        tops = inside.tops()
        texts = set(inside.ending(TEXT_ENDS))
        stems = [_text(os.path.splitext(name)[0], tops) for name in pictures]
        has = np.array([[stem + end in texts for end in TEXT_ENDS] for stem in stems], bool)
        has = has.reshape(-1, len(TEXT_ENDS)) & (not self.without_captions)
        if not has.any() and not (self.without_captions and pictures):
            raise DataError(
                f"{root}: {'no captions' if pictures else 'no pictures'}; {inside.describe()}, "
                f"expected {', '.join(PICTURE_ENDS[:4])} and so on, each with a .txt or .json of "
                "the same name"
            )
        names = [os.fsencode(name) for name in pictures]
        for name, value in (  # the dataclass is frozen
            ("classes", ()),
            ("_root", root),
            ("_names", b"".join(names)),
            ("_ends", np.cumsum([len(name) for name in names], dtype=np.int64)),
            ("_has", has),
            ("_tops", tops),
            ("_account", _account(inside, pictures, stems, has)),
        ):
            object.__setattr__(self, name, value)
        paths = [path for row in range(len(names)) for path in self._paths(row)]
        object.__setattr__(self, "_stamps", stamps(paths).reshape(-1, 1 + len(TEXT_ENDS), 2))
        reader, guesses = (None, ()) if self.without_captions else self._decide()
        object.__setattr__(self, "_reader", reader)
        object.__setattr__(self, "_guesses", guesses)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, row: int) -> Example:
        example = self.glance(row)
        image = self._read(row, 0)
        if not image:
            raise BadSample(example.key, "the picture has no bytes")
        return example._replace(image=image)

    def glance(self, row: int) -> Example:
        """As `Source.glance`: reads the captions alone."""
        if not 0 <= row < len(self):
            raise IndexError(row)
        key = self._key(row)
        if self.without_captions:
            return Example(b"", (), row, key)
        captions = self._reader.of_row(key, self._texts(row))
        if captions is None:
            raise BadSample(key, "no caption (.txt or .json)")
        self.limits.check_texts(key, captions)
        return Example(b"", captions, row, key)

    def keys(self) -> Iterator[str]:
        return map(self._key, range(len(self)))

    def file(self, row: int) -> str:
        """The path of a row's picture."""
        return self._paths(row)[0]

    def account(self) -> Account:
        return self._account

    def guesses(self) -> tuple[Guess, ...]:
        return self._guesses

    def _name(self, row: int) -> str:
        return os.fsdecode(self._names[self._ends[row - 1] if row else 0 : self._ends[row]])

    def _key(self, row: int) -> str:
        return printable(os.path.splitext(self._name(row))[0].replace(os.sep, "/"))

    def _paths(self, row: int) -> list[str]:
        """The picture, and the files that may have its captions."""
        name = self._name(row)
        stem = _text(os.path.splitext(name)[0], self._tops)
        return [os.path.join(self._root, one) for one in (name, *(stem + e for e in TEXT_ENDS))]

    def _texts(self, row: int) -> Texts:
        """What the files have that may have the captions of a row."""
        return Texts(
            *(self._read(row, 1 + i) if has else None for i, has in enumerate(self._has[row]))
        )

    def _read(self, row: int, which: int) -> bytes:
        """The contents of one of a row's `_paths`."""
        path, stamp, key = self._paths(row)[which], self._stamps[row, which], self._key(row)
        self.limits.check_bytes(key, int(stamp[0]))
        try:
            return read_file(path, stamp)
        except OSError as error:
            raise BadSample(key, f"{path} cannot be read ({error.strerror})") from None

    def _decide(self) -> tuple[Reader, tuple[Guess, ...]]:
        """The reader of the captions, and what was guessed for it from a sample of the rows."""
        (rows,) = np.nonzero(self._has.any(axis=1))
        samples = []
        for row in rows[spread(len(rows), SAMPLED)].tolist():
            with contextlib.suppress(BadSample):
                samples.append(self._texts(row))
        return decide(self._root, self, samples)


def _text(stem: str, tops: tuple[str, str]) -> str:
    """The path of a picture's texts, without the ending."""
    images, texts = tops
    return texts + stem[len(images) :] if images and stem.startswith(images) else stem


def _account(inside: Folder, pictures: list[str], stems: list[str], has: np.ndarray) -> Account:
    """What became of every file of the folder."""
    used = {*pictures} | {
        stem + end
        for stem, row in zip(stems, has.tolist())
        for end, yes in zip(TEXT_ENDS, row)
        if yes
    }
    tally = Tally()
    for name in inside.files:
        if name not in used:
            end = os.path.splitext(name)[1].lower()
            tally.add(
                "texts without a picture of the same name"
                if end in TEXT_ENDS
                else "files with an ending that is not read",
                name,
            )
    for name in inside.hidden:
        tally.add("hidden files", name)
    found = len(inside.files) + len(inside.hidden)
    return Account("files", found, len(used), tally.skipped())
