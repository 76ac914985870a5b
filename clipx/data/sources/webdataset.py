"""Random access to WebDataset shards: uncompressed tars of `key.jpg`, `key.txt`, ...

The headers of every tar are read once. The resulting index of offsets is cached for the user, and
reading a row is then one read. So shards do not constrain how rows are shuffled or split: their
number and sizes are arbitrary.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from clipx.data.base import Account, Example, Guess, Source
from clipx.data.captions import (
    SAMPLED,
    Lines,
    Member,
    Reader,
    Texts,
    decide,
    decode,
)
from clipx.data.order import spread
from clipx.data.reading import read
from clipx.data.shard_index import PICTURES, ROLES, index_shards
from clipx.data.storage import ABSENT, Shard, threads
from clipx.data.tars import BLOCK, merged
from clipx.errors import BadSample


@dataclasses.dataclass(frozen=True)
class WebDataset(Source):
    """Samples of tar shards, in the order of the paths and of the first member of each.

    A sample is the members of one tar with the same key, which is their folder and their name up to
    the first dot: a picture (jpg, jpeg, png, webp), captions in `.json` (a list `captions` or a
    string `caption`) or else in `.txt`, and a label in `.cls`. Pictures stay encoded. Of members
    with the same name the last one counts, and `account` tells what is part of no sample.

    Reading a sample raises `BadSample` if it has no picture, or neither a caption nor a label. The
    constructor raises `DataError` for a shard that is missing, truncated, empty or not a tar. It
    never skips one, because a run on half of the data would look like a run on all of it.
    """

    # a tar, a glob, a brace range a-{000000..000005}.tar, or several; also gs://, s3://, https://
    # and whatever else fsspec has a filesystem for
    path: str | tuple[str, ...]
    truncated: Literal["refuse", "keep"] = "refuse"  # keep: use the complete samples of such a tar
    captions_key: str = "captions"  # key of a list in .json
    caption_key: str = "caption"  # key of a string in .json, used if there is no list
    # which has the captions of a sample that has both; None: .json, unless it has none
    captions_from: Member | None = None
    # whether a .txt is one caption or each line is one; None: each, if all have several lines
    txt_lines: Lines | None = None
    classes: tuple[str, ...] = ()  # names of the labels in .cls

    def __post_init__(self) -> None:
        # a few flat arrays: compact, shared after a fork and quick to pickle
        self._shards: tuple[Shard, ...]
        self._shard_ends: np.ndarray  # the end of each shard's rows
        self._keys: bytes  # the keys of all rows, concatenated
        self._key_ends: np.ndarray  # the end of each row's key in `_keys`
        self._places: np.ndarray  # `ShardIndex.places` of all rows
        self._account: Account
        self._reader: Reader
        self._guesses: tuple[Guess, ...]
        indexes = index_shards(self.path, keep=self.truncated == "keep")
        for name, value in (  # the dataclass is frozen
            ("_shards", tuple(index.shard for index in indexes)),
            ("_shard_ends", np.cumsum([len(index) for index in indexes])),
            ("_keys", b"".join(index.keys for index in indexes)),
            ("_key_ends", np.concatenate([i.key_sizes for i in indexes]).cumsum(dtype=np.int64)),
            ("_places", np.concatenate([index.places for index in indexes])),
            ("_account", merged((os.path.basename(i.path), i.account) for i in indexes)),
        ):
            object.__setattr__(self, name, value)
        reader, guesses = self._decide()
        object.__setattr__(self, "_reader", reader)
        object.__setattr__(self, "_guesses", guesses)

    def __len__(self) -> int:
        return len(self._places)

    def keys(self) -> Iterator[str]:
        """`Example.key` of every row, in order, without reading the data."""
        return map(self._key, range(len(self)))

    def _shard(self, row: int) -> Shard:
        return self._shards[np.searchsorted(self._shard_ends, row, side="right")]

    def _key(self, row: int) -> str:
        start = self._key_ends[row - 1] if row else 0
        name = self._keys[start : self._key_ends[row]].decode("utf-8", "backslashreplace")
        return f"{os.path.basename(self._shard(row).path)}/{name}"

    def __getitem__(self, row: int) -> Example:
        key, (image, text, meta, label) = self._members(row, range(len(ROLES)))
        if image is None:
            raise BadSample(key, "no picture (" + ", ".join(f".{e}" for e in PICTURES) + ")")
        if not image:
            raise BadSample(key, "the picture has no bytes")
        return Example(image, self._texts(key, text, meta, label), row, key, _label(key, label))

    def glance(self, row: int) -> Example:
        """As `Source.glance`. Reads the caption and the label alone."""
        key, (_, text, meta, label) = self._members(row, (1, 2, 3))
        size = int(self._places[row, 0, 1])
        if size <= 0:
            return self[row]  # raises what is wrong with it
        return Example(b"", self._texts(key, text, meta, label), row, key, _label(key, label))

    def _members(self, row: int, roles: Sequence[int]) -> tuple[str, list[bytes | None]]:
        """(the key of a row, the bytes of its members by role; None for roles not asked for)."""
        if not 0 <= row < len(self):
            raise IndexError(row)
        shard, key = self._shard(row), self._key(row)
        places = [
            (block * BLOCK, size if role in roles else ABSENT)
            for role, (block, size) in enumerate(self._places[row].tolist())
        ]
        self.limits.check_bytes(key, max(size for _, size in places))
        return key, read(shard, places)

    def account(self) -> Account:
        """What became of every member of the shards."""
        return self._account

    def guesses(self) -> tuple[Guess, ...]:
        """Where the captions are, if the config leaves it open."""
        return self._guesses

    def _decide(self) -> tuple[Reader, tuple[Guess, ...]]:
        """The reader of the captions, and what was guessed for it from a sample of the rows."""
        (rows,) = np.nonzero((self._places[:, 1:3, 1] != ABSENT).any(axis=1))
        rows = rows[spread(len(rows), SAMPLED)]

        def texts(row: int) -> Texts | None:
            with contextlib.suppress(BadSample):
                _, (_, text, meta, _) = self._members(row, (1, 2))
                return Texts(text, meta)

        with concurrent.futures.ThreadPoolExecutor(
            threads(shard.path for shard in self._shards)
        ) as pool:
            samples = [one for one in pool.map(texts, rows.tolist()) if one is not None]
        labels = bool((self._places[:, 3, 1] != ABSENT).any())
        return decide(self._shards[0].path, self, samples, labels=labels)

    def _texts(
        self, key: str, text: bytes | None, meta: bytes | None, label: bytes | None
    ) -> tuple[str, ...]:
        """The non-empty captions, stripped; () for a sample that only has a label."""
        captions = self._reader.of_row(key, Texts(text, meta))
        if captions is None and label is None:
            raise BadSample(key, "no caption (.txt or .json)")
        self.limits.check_texts(key, captions or ())
        return captions or ()


def _label(key: str, data: bytes | None) -> int | None:
    if data is None:
        return None
    try:
        return int(decode(data))
    except ValueError:
        raise BadSample(key, f"the label in .cls is {data[:20]!r}, expected a number") from None
