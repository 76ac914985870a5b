"""Random access to WebDataset shards: uncompressed tars with adjacent `key.jpg`, `key.txt`, ...

The headers of every tar are read once. The resulting index of offsets is cached for the user, and
reading a row is then one read. So shards do not constrain how rows are shuffled or split: their
number and sizes are arbitrary.
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
from typing import Any, Literal

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

_ROLES = ("image", "txt", "json", "cls")  # the members of a sample
_PICTURES = ("jpg", "jpeg", "png", "webp")
_ROLE = dict.fromkeys(_PICTURES, 0) | {"txt": 1, "json": 2, "cls": 3}  # index by extension
_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)")  # the key ends at the first dot of the file name
_BLOCK = tarfile.BLOCKSIZE  # the data of every member starts at a multiple of it
VERSION = 1  # format of the cached index


@dataclasses.dataclass(frozen=True)
class WebDataset(Source):
    """Samples of tar shards, in the order of the paths and of the members.

    A sample is a run of consecutive members with the same key: a picture (jpg, jpeg, png, webp),
    captions in `.json` (a list `captions` or a string `caption`) or else in `.txt`, and a label in
    `.cls`. Pictures stay encoded.

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
    classes: tuple[str, ...] = ()  # names of the labels in .cls

    def __post_init__(self) -> None:
        # a few flat arrays: compact, shared after a fork and quick to pickle
        self._shards: tuple[str, ...]  # paths
        self._shard_ends: np.ndarray  # the end of each shard's rows
        self._keys: bytes  # the keys of all rows, concatenated
        self._key_ends: np.ndarray  # the end of each row's key in `_keys`
        self._places: np.ndarray  # `ShardIndex.places` of all rows
        indexes = index_shards(self.path, keep=self.truncated == "keep")
        for name, value in (  # the dataclass is frozen
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
        """`Example.key` of every row, in order, without reading the data."""
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

    def _texts(
        self, key: str, text: bytes | None, meta: bytes | None, label: bytes | None
    ) -> tuple[str, ...]:
        """The non-empty captions, stripped; () for a sample that only has a label."""
        captions: Any = None
        try:
            if meta is not None:
                values = json.loads(meta)
                if isinstance(values, dict):
                    captions = values.get(self.captions_key)
                    if captions is None and self.caption_key in values:
                        captions = [values[self.caption_key]]
            if captions is None and text is not None:
                captions = [text.decode("utf-8")]
        except (ValueError, RecursionError) as error:  # from json.loads and decode
            raise BadSample(key, f"the caption cannot be read ({error})") from None
        if captions is None:
            if label is not None:
                return ()
            raise BadSample(key, "no caption (.txt or .json)")
        if not isinstance(captions, list) or not all(isinstance(t, str) for t in captions):
            raise BadSample(key, "the captions in .json are not a list of strings")
        # JSON can contain half a surrogate pair, which UTF-8 cannot encode
        encodable = (t.encode("utf-8", "replace").decode() for t in captions)
        texts = tuple(t for t in (t.replace("\0", "").strip() for t in encodable) if t)
        if not texts:
            raise BadSample(key, "empty caption")
        return texts


def _label(key: str, data: bytes | None) -> int | None:
    if data is None:
        return None
    try:
        return int(data)
    except ValueError:
        raise BadSample(key, f"the label in .cls is {data[:20]!r}, expected a number") from None


@dataclasses.dataclass(frozen=True)
class ShardIndex:
    """The samples of one tar, from its headers."""

    path: str
    keys: bytes  # the keys of all samples, concatenated
    key_sizes: Int32[np.ndarray, " n"]  # bytes
    places: Int32[np.ndarray, "n 4 2"]  # by role: offset in blocks of 512 bytes, size in bytes
    extensions: tuple[str, ...]  # of all members, used or not
    last: str  # name of the last complete member
    whole: bool  # the tar has its end mark

    def __len__(self) -> int:
        return len(self.places)

    def arrays(self) -> dict[str, np.ndarray]:
        """All fields but the path, in the format that `of` reads."""
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
        samples = (arrays["key_sizes"], arrays["places"])
        return cls(path, keys, *samples, tuple(extensions), last, whole)

    def without_last(self) -> ShardIndex:
        """The index without the last sample."""
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
    """The index of every shard of `path`, in order.

    Indexes that are not in the cache are made and stored there. For a remote shard this downloads
    most of the shard. `progress(done, total)` is called after each shard.

    Raises `DataError` for a path that matches no file, and for a shard that is missing, empty,
    truncated, or without pictures or captions. With `keep`, a truncated shard has the samples
    before the last one, which may be incomplete.
    """
    patterns = (path,) if isinstance(path, str) else path
    shards = list(itertools.chain.from_iterable(map(expand, patterns)))
    if not shards:
        raise DataError("data path: nothing given, expected a tar, a glob or a brace range")
    indexes = []
    # threads only slow down the reading of headers from a local disk
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
        index = index.without_last()  # members of the last sample may be truncated or missing
        if not keep:
            raise DataError(
                f"{shard.path}: truncated or damaged; the last complete member is "
                f"{index.last or 'none'}, {len(index)} complete samples can be read; copy the "
                "shard again, or set truncated='keep' to use these samples"
            )
    for content, roles, expected in (
        ("pictures", [0], ", ".join(f".{e}" for e in _PICTURES)),
        ("captions", [1, 2, 3], ".txt or .json, or labels in .cls"),
    ):
        if (index.places[:, roles, 1] == ABSENT).all():
            listed = ", ".join(f".{e}" for e in index.extensions) or "no members at all"
            raise DataError(f"{shard.path}: no {content}; found {listed}, expected {expected}")
    return index


def _scan(shard: Shard) -> ShardIndex:
    """Makes the index of one tar by reading its headers."""
    keys: list[str] = []
    places: list[list[tuple[int, int]]] = []
    extensions: set[str] = set()
    last, whole = "", True
    try:
        with open_shard(shard.path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            try:
                while (member := tar.next()) is not None:
                    # else tarfile keeps every member in memory
                    tar.members = []  # pyright: ignore[reportAttributeAccessIssue]
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
            # tarfile takes a truncated header for the end; the real end is a block of zeros
            file.seek(tar.offset)
            whole = whole and file.read(_BLOCK) == bytes(_BLOCK)
    except tarfile.ReadError:
        with open_shard(shard.path) as file:
            raise DataError(f"{shard.path}: {_not_a_tar(file.read(_BLOCK))}") from None
    except DataError:
        raise
    except Exception as error:  # every remote filesystem has its own exceptions
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


def _not_a_tar(start: bytes) -> str:
    """Why tarfile refuses the first block of a file, and what to do about it."""
    if not start:
        return "an empty file (0 bytes), expected a tar; copy the shard again"
    if start[:2] == b"\x1f\x8b" or start[:4] == b"\x28\xb5\x2f\xfd" or start[:3] == b"BZh":
        return "a compressed tar, expected an uncompressed one for random access; decompress it"
    if len(start) < _BLOCK:
        return f"truncated to {len(start)} bytes, expected a tar; copy the shard again"
    return "not a tar"
