"""Random access to WebDataset shards: plain tars in which `key.jpg`, `key.txt`, ... lie together.

The headers of every tar are read once, into an index of places that is kept in the user's cache; a
row is then one read. So shards never constrain how rows are shuffled or split: they may be few, and
of any size.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import itertools
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
from jaxtyping import Int32

from clipx.data.base import Example, Source
from clipx.data.storage import (
    ABSENT,
    THREADS,
    Shard,
    expand,
    is_remote,
    open_shard,
    read,
    recall,
    remember,
)
from clipx.errors import BadSample, DataError

_ROLES = ("image", "txt", "json", "cls")  # what a member is to its sample
_PICTURES = ("jpg", "jpeg", "png", "webp")
_ROLE = dict.fromkeys(_PICTURES, 0) | {"txt": 1, "json": 2, "cls": 3}  # by extension
_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)")  # the key ends at the name's first dot
_BLOCK = tarfile.BLOCKSIZE  # a member's data starts at a multiple of it
VERSION = 1  # of the cached index


@dataclasses.dataclass(frozen=True)
class WebDataset(Source):
    """Samples of tar shards, in the order of the paths and of the members.

    A sample is a run of members with one key: a picture (jpg, jpeg, png, webp), captions in `.json`
    (`captions`, a list, or `caption`) or else in `.txt`, a label in `.cls`. Nothing is decoded
    here. A sample that lacks its picture or has no words is a `BadSample` when it is read. A shard
    that is missing, truncated, empty or of another kind raises `DataError` when the set is opened:
    a run that quietly leaves out half a shard cannot be told from one that does not.
    """

    # a tar, a glob, a brace range a-{000000..000005}.tar, or several; gs://, s3://, https://, ...
    # where fsspec has a filesystem for it
    path: str | tuple[str, ...]
    truncated: Literal["refuse", "keep"] = "refuse"  # keep: use the whole samples of such a tar
    captions_key: str = "captions"  # a list in the json
    caption_key: str = "caption"  # a string in the json, where there is no list
    classes: tuple[str, ...] = ()  # names of the labels in .cls

    def __post_init__(self):
        indexes = index_shards(self.path, keep=self.truncated == "keep")
        # a few flat arrays: small, shared by forks, quick to pickle
        for name, value in (
            ("_shards", tuple(index.path for index in indexes)),
            ("_shard_ends", np.cumsum([len(index) for index in indexes])),
            ("_keys", b"".join(index.keys for index in indexes)),
            ("_key_ends", np.concatenate([i.key_sizes for i in indexes]).cumsum(dtype=np.int64)),
            ("_places", np.concatenate([index.places for index in indexes])),
        ):
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        return len(self._places)

    def keys(self) -> Iterator[str]:
        """`Example.key` of every row, in order; nothing is read."""
        return map(self._key, range(len(self)))

    def _shard(self, row: int) -> str:
        return self._shards[np.searchsorted(self._shard_ends, row, side="right")]

    def _key(self, row: int) -> str:
        start = self._key_ends[row - 1] if row else 0
        name = self._keys[start : self._key_ends[row]].decode("utf-8", "backslashreplace")
        return f"{os.path.basename(self._shard(row))}/{name}"

    def __getitem__(self, row: int) -> Example:
        if not 0 <= row < len(self):
            raise IndexError(row)
        shard, key = self._shard(row), self._key(row)
        places = [(block * _BLOCK, size) for block, size in self._places[row].tolist()]
        try:
            image, text, meta, label = read(shard, places)
        except OSError as error:
            raise BadSample(key, f"{shard} cannot be read ({error.strerror or error})") from None
        if image is None:
            raise BadSample(key, "no picture (" + ", ".join(f".{e}" for e in _PICTURES) + ")")
        if not image:
            raise BadSample(key, "the picture has no bytes")
        return Example(image, self._texts(key, text, meta, label), row, key, _label(key, label))

    def _texts(self, key: str, text, meta, label) -> tuple[str, ...]:
        """The captions, stripped; () for a sample that has a label alone."""
        found: list | None = None
        try:
            if meta is not None:
                values = json.loads(meta)
                if isinstance(values, dict):
                    found = values.get(self.captions_key)
                    if found is None and self.caption_key in values:
                        found = [values[self.caption_key]]
            if found is None and text is not None:
                found = [text.decode("utf-8")]
        except (ValueError, RecursionError) as error:  # of json and of utf-8
            raise BadSample(key, f"the caption cannot be read ({error})") from None
        if found is None:
            if label is not None:
                return ()
            raise BadSample(key, "no caption (.txt or .json)")
        if not isinstance(found, list) or not all(isinstance(t, str) for t in found):
            raise BadSample(key, "the captions in .json are no list of strings")
        # JSON can hold halves of characters, which nothing else can
        found = (t.encode("utf-8", "replace").decode() for t in found)
        texts = tuple(t for t in (t.replace("\0", "").strip() for t in found) if t)
        if not texts:
            raise BadSample(key, "empty caption")
        return texts


def _label(key: str, data: bytes | None) -> int | None:
    try:
        return None if data is None else int(data)
    except ValueError:
        raise BadSample(key, f"the label in .cls is {data[:20]!r}, expected a number") from None


@dataclasses.dataclass(frozen=True)
class ShardIndex:
    """What the headers of one tar say."""

    path: str
    keys: bytes  # one after another
    key_sizes: Int32[np.ndarray, " n"]  # bytes
    places: Int32[np.ndarray, "n 4 2"]  # by role: offset in blocks of 512 bytes, size in bytes
    extensions: tuple[str, ...]  # all there are, used or not
    last: str  # the last whole member
    whole: bool  # the tar ends as a tar should

    def __len__(self) -> int:
        return len(self.places)

    def arrays(self) -> dict[str, np.ndarray]:
        """All but the path, as `of` takes it."""
        about = json.dumps((self.extensions, self.last, self.whole)).encode()
        return {
            "keys": np.frombuffer(self.keys, np.uint8),
            "key_sizes": self.key_sizes,
            "places": self.places,
            "about": np.frombuffer(about, np.uint8),
        }

    @classmethod
    def of(cls, path: str, arrays: dict[str, np.ndarray]) -> ShardIndex:
        extensions, last, whole = json.loads(arrays["about"].tobytes())
        keys = arrays["keys"].tobytes()
        found = (arrays["key_sizes"], arrays["places"])
        return cls(path, keys, *found, tuple(extensions), last, whole)

    def without_last(self) -> ShardIndex:
        return dataclasses.replace(
            self,
            keys=self.keys[: self.key_sizes[:-1].sum()],
            key_sizes=self.key_sizes[:-1],
            places=self.places[:-1],
        )


def index_shards(
    path: str | tuple[str, ...],
    *,
    keep: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[ShardIndex]:
    """The index of every shard of `path`, in order; those not in the cache are read and put there.

    `progress(done, total)` is called after each shard. Raises `DataError` for a path that names
    nothing and for a shard that is missing, empty, truncated (unless `keep`: then without its last
    sample, which may be cut), or holds no pictures or no captions. An index of a remote shard that
    is not cached costs the reading of most of it.
    """
    patterns = (path,) if isinstance(path, str) else path
    shards = list(itertools.chain.from_iterable(map(expand, patterns)))
    if not shards:
        raise DataError("data path: nothing given, expected a tar, a glob or a brace range")
    indexes = []
    # threads hold each other up over the headers of local shards
    threads = THREADS if any(map(is_remote, patterns)) else 1
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for index in pool.map(functools.partial(_index, keep=keep), shards):
            indexes.append(index)
            if progress:
                progress(len(indexes), len(shards))
    return indexes


def _index(shard: Shard, *, keep: bool) -> ShardIndex:
    known = recall(shard, VERSION)
    index = _scan(shard) if known is None else ShardIndex.of(shard.path, known)
    if known is None:
        remember(shard, VERSION, index.arrays())
    if not index.whole:
        index = index.without_last()  # its members may be cut, or missing
        if not keep:
            raise DataError(
                f"{shard.path}: truncated or damaged; the last whole member is "
                f"{index.last or 'none'}, {len(index)} whole samples are readable; copy the shard "
                "again, or set truncated='keep' to use those"
            )
    for what, roles, wanted in (
        ("pictures", [0], ", ".join(f".{e}" for e in _PICTURES)),
        ("captions", [1, 2, 3], ".txt or .json, or labels in .cls"),
    ):
        if (index.places[:, roles, 1] == ABSENT).all():
            there = ", ".join(f".{e}" for e in index.extensions) or "no members at all"
            raise DataError(f"{shard.path}: no {what}; found {there}, expected {wanted}")
    return index


def _scan(shard: Shard) -> ShardIndex:
    """The index of one tar, from its headers."""
    keys: list[str] = []
    places: list[list[tuple[int, int]]] = []
    extensions: set[str] = set()
    last, whole = "", True
    try:
        with open_shard(shard.path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            try:
                while (member := tar.next()) is not None:
                    tar.members = []  # it would keep them all
                    if member.offset_data + member.size <= shard.size:
                        last = member.name
                    match = _NAME.fullmatch(member.name)
                    if not (member.isreg() and match):
                        continue
                    key, extension = match[1], match[2].lower()
                    extensions.add(extension)
                    if extension not in _ROLE:
                        continue
                    if not keys or keys[-1] != key:
                        keys.append(key)
                        places.append([(0, ABSENT)] * len(_ROLES))
                    if places[-1][_ROLE[extension]][1] == ABSENT:
                        size = min(member.size, np.iinfo(np.int32).max)
                        places[-1][_ROLE[extension]] = (member.offset_data // _BLOCK, size)
            except tarfile.ReadError:
                whole = False
            # tarfile takes a cut header for the end; the real end is a block of zeros
            file.seek(tar.offset)
            whole = whole and file.read(_BLOCK) == bytes(_BLOCK)
    except tarfile.ReadError:
        with open_shard(shard.path) as file:
            raise DataError(f"{shard.path}: {_what_else(file.read(_BLOCK))}") from None
    except DataError:
        raise
    except Exception as error:  # of the disk, or of a remote filesystem, each with its own kinds
        reason = getattr(error, "strerror", None) or error or type(error).__name__
        raise DataError(f"{shard.path}: cannot be read ({reason})") from None
    encoded = [key.encode("utf-8", "surrogateescape") for key in keys]
    return ShardIndex(
        path=shard.path,
        keys=b"".join(encoded),
        key_sizes=np.array([len(key) for key in encoded], np.int32),
        places=np.array(places, np.int32).reshape(-1, len(_ROLES), 2),
        extensions=tuple(sorted(extensions)),
        last=last,
        whole=whole,
    )


def _what_else(start: bytes) -> str:
    """Why tarfile refuses the very start of a file, and what to do about it."""
    if not start:
        return "an empty file (0 bytes), expected a tar; copy the shard again"
    if start[:2] == b"\x1f\x8b" or start[:4] == b"\x28\xb5\x2f\xfd" or start[:3] == b"BZh":
        return "a compressed tar, expected a plain one (random access needs it); unpack it first"
    if len(start) < _BLOCK:
        return f"truncated to {len(start)} bytes, expected a tar; copy the shard again"
    return "not a tar"
