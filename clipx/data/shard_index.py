"""The index of tar shards: where the members of each sample are. Cached for the user."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
import itertools
import json
import posixpath
import re
import tarfile
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int32

from clipx.data import tars
from clipx.data.base import Account, Skipped
from clipx.data.storage import (
    ABSENT,
    Shard,
    expand,
    open_shard,
    recall,
    refuse_folder,
    remember,
    threads,
)
from clipx.data.tars import BLOCK, HIDDEN, NO_ENDING, UNREAD, Tally, describe_tail, shown
from clipx.errors import DataError

ROLES = ("image", "txt", "json", "cls")  # the members of a sample
PICTURES = ("jpg", "jpeg", "png", "webp")
_ROLE = dict.fromkeys(PICTURES, 0) | {"txt": 1, "json": 2, "cls": 3}  # index by extension
# the key ends at the first dot of the file name
_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)
_LISTED = 8  # endings listed, and reasons of endings told apart
_DOTS = "dots in the name: the key ends at the first one, so the rest is an ending that is not read"
VERSION = 2  # format of the cached index


@dataclasses.dataclass(frozen=True)
class ShardIndex:
    """The samples of one tar, from its headers."""

    shard: Shard
    keys: bytes  # the keys of all samples, concatenated
    key_sizes: Int32[np.ndarray, " n"]  # bytes
    places: Int32[np.ndarray, "n 4 2"]  # by role: offset in blocks of 512 bytes, size in bytes
    found: int  # members of the tar
    skipped: tuple[Skipped, ...]  # those that are part of no sample
    endings: str  # the endings of all members, as an error lists them
    last: str  # name of the last complete member
    cut: bool  # the tar ends, or is damaged, before its end mark
    tail: int  # bytes after the end mark that are no tar
    end: int  # the byte at which reading stopped

    def __len__(self) -> int:
        return len(self.places)

    @property
    def path(self) -> str:
        return self.shard.path

    @property
    def account(self) -> Account:
        """What became of every member of the tar."""
        used = int((self.places[..., 1] != ABSENT).sum())
        return Account("members", self.found, used, self.skipped)

    def arrays(self) -> dict[str, np.ndarray]:
        """All fields but the shard, in the format that `of` reads."""
        plain = {name: getattr(self, name) for name in _PLAIN}
        return {
            "keys": np.frombuffer(self.keys, np.uint8),
            "key_sizes": self.key_sizes,
            "places": self.places,
            "about": np.frombuffer(json.dumps(plain).encode(), np.uint8),
        }

    @classmethod
    def of(cls, shard: Shard, arrays: dict[str, np.ndarray]) -> ShardIndex:
        """The index of a tar, from what `arrays` gave."""
        about = json.loads(arrays["about"].tobytes())
        about["skipped"] = tuple(Skipped(r, n, tuple(names)) for r, n, names in about["skipped"])
        samples = {name: arrays[name] for name in ("key_sizes", "places")}
        return cls(shard=shard, keys=arrays["keys"].tobytes(), **samples, **about)

    def complete(self) -> ShardIndex:
        """The index without what a cut or a tail leaves uncertain: members of the last sample of a
        tar that is cut off may be truncated or missing."""
        tally, kept = Tally(self.skipped), np.ones(len(self), bool)
        if self.tail:
            tally.add(describe_tail(self.tail, self.end), count=0)
        if self.cut and len(self):
            kept[np.argmax(self.places[..., 0].max(axis=1))] = False
            lost = int((self.places[~kept][..., 1] != ABSENT).sum())
            where = f"the shard is cut off or damaged after byte {self.end:,}"
            tally.add(f"the last sample, as {where}", self.last, count=lost)
        sizes = np.repeat(kept, self.key_sizes)
        return dataclasses.replace(
            self,
            keys=np.frombuffer(self.keys, np.uint8)[sizes].tobytes(),
            key_sizes=self.key_sizes[kept],
            places=self.places[kept],
            skipped=tally.skipped(),
        )


_PLAIN = ("found", "skipped", "endings", "last", "cut", "tail", "end")


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
    truncated, followed by other bytes, or without pictures or captions. With `keep`, a truncated
    shard has the samples before the last one, which may be incomplete.
    """
    patterns = (path,) if isinstance(path, str) else path
    shards = list(itertools.chain.from_iterable(map(expand, patterns)))
    if not shards:
        raise DataError("data path: nothing given, expected a tar, a glob or a brace range")
    for shard in shards:
        refuse_folder(shard.path, "a tar")
    indexes = []
    with concurrent.futures.ThreadPoolExecutor(threads(patterns)) as pool:
        for index in pool.map(functools.partial(_index, keep=keep), shards):
            indexes.append(index)
            if progress:
                progress(len(indexes), len(shards))
    return indexes


def _index(shard: Shard, *, keep: bool) -> ShardIndex:
    known = recall(shard, VERSION)
    index = _scan(shard) if known is None else ShardIndex.of(shard, known)
    if known is None:
        remember(shard, VERSION, index.arrays())
    if index.cut or index.tail:
        cut, index = index.cut, index.complete()
        if not keep:
            raise DataError(_fault(index, cut=cut))
    _refuse_no_pairs(index)
    return index


def _fault(index: ShardIndex, *, cut: bool) -> str:
    """The error for a file that is no whole tar."""
    if cut:
        return (
            f"{index.path}: truncated or damaged; the last complete member is "
            f"{shown(index.last) or 'none'}, {len(index)} complete samples can be read; copy the "
            "shard again, or set truncated='keep' to use these samples"
        )
    return (
        f"{index.path}: {describe_tail(index.tail, index.end)}; {len(index)} samples come before "
        f"them; copy the shard again, cut these bytes off (truncate -s {index.end} FILE), or set "
        "truncated='keep' to leave them out"
    )


def _refuse_no_pairs(index: ShardIndex) -> None:
    """Raises `DataError` for a shard without pictures, without captions and labels, or in which no
    sample has both."""
    has = index.places[..., 1] != ABSENT
    pictures, words = has[:, 0], has[:, 1:].any(axis=1)
    for content, there, expected in (
        ("pictures", pictures, ", ".join(f".{e}" for e in PICTURES)),
        ("captions", words, ".txt or .json, or labels in .cls"),
    ):
        if not there.any():
            reasons = "".join(
                f"; {s.count:,} of {index.found:,} members are left out: {s.reason} "
                f"({', '.join(s.examples)})"
                for s in index.skipped
                if not s.reason.startswith(UNREAD)
            )
            raise DataError(
                f"{index.path}: no {content}; found {index.endings}, expected {expected}{reasons}"
            )
    if not (pictures & words).any():
        keys = np.split(np.frombuffer(index.keys, np.uint8), np.cumsum(index.key_sizes)[:-1])
        first, other = (
            shown(keys[np.argmax(there)].tobytes().decode("utf-8", "surrogateescape"))
            for there in (pictures, words)
        )
        raise DataError(
            f"{index.path}: no sample has both a picture and a caption or label: "
            f"{pictures.sum():,} have pictures alone, such as {first}, and {words.sum():,} "
            f"captions or labels alone, such as {other}; a picture and its caption need the same "
            "name up to the first dot, folder included" + _flat(first, other)
        )


def _flat(first: str, other: str) -> str:
    """What to do if only the folders of two keys differ."""
    if posixpath.dirname(first) == posixpath.dirname(other):
        return ""
    return "; pack the files without their folders: tar --transform='s,.*/,,' --sort=name"


def _scan(shard: Shard) -> ShardIndex:
    """Makes the index of one tar by reading its headers."""
    contents = _contents(shard)
    keys: list[str] = []
    places: list[list[tuple[int, int]]] = []
    rows: dict[str, int] = {}
    endings: collections.Counter[str] = collections.Counter()
    tally, unread = Tally(contents.skipped), collections.defaultdict[str, list[str]](list)
    for normal, member in contents.files.items():
        match, named = _NAME.fullmatch(normal), _NAME.fullmatch(member.name)
        if not (match and named):
            tally.add(_unnamed(posixpath.basename(normal)), member.name)
            continue
        ending = match[2].lower()
        endings[ending] += 1
        if ending not in _ROLE:
            unread[ending].append(member.name)
            continue
        row = rows.setdefault(match[1], len(rows))
        if row == len(keys):
            keys.append(named[1])
            places.append([(0, ABSENT)] * len(ROLES))
        if places[row][_ROLE[ending]][1] != ABSENT:
            tally.add("a second file of the same kind in one sample", member.name)
            continue
        size = min(member.size, np.iinfo(np.int32).max)
        places[row][_ROLE[ending]] = (member.offset // BLOCK, size)
    _add_unread(tally, unread)
    encoded = [key.encode("utf-8", "surrogateescape") for key in keys]
    return ShardIndex(
        shard=shard,
        keys=b"".join(encoded),
        key_sizes=np.array([len(key) for key in encoded], np.int32),
        places=np.array(places, np.int32).reshape(-1, len(ROLES), 2),
        found=contents.found,
        skipped=tally.skipped(),
        endings=_listed(sorted(endings), contents.found),
        last=contents.last,
        cut=contents.cut,
        tail=contents.tail,
        end=contents.end,
    )


def _contents(shard: Shard) -> tars.Contents:
    """The members of a tar. Raises `DataError` for a file that is none or cannot be read."""
    try:
        return tars.scan(shard.path, shard.size)
    except tarfile.ReadError:
        with open_shard(shard.path) as file:
            raise DataError(f"{shard.path}: {tars.not_a_tar(file.read(BLOCK))}") from None
    except DataError:
        raise
    except Exception as error:  # every remote filesystem has its own exceptions
        reason = getattr(error, "strerror", None) or error or type(error).__name__
        raise DataError(f"{shard.path}: cannot be read ({reason})") from None


def _unnamed(file: str) -> str:
    """Why a file name has no key and no ending."""
    if file.startswith("._"):
        return "macOS's own data, in names that start with ._"
    return HIDDEN if file.startswith(".") else NO_ENDING


def _add_unread(tally: Tally, unread: dict[str, list[str]]) -> None:
    """Counts the members whose ending is not read: those with dots in their names, the most
    frequent endings, and all others."""
    dotted = [ending for ending in unread if ending.rpartition(".")[2] in _ROLE]
    for ending in dotted:
        names = unread.pop(ending)
        tally.add(_DOTS, *names, count=len(names))
    ranked = sorted(unread.items(), key=lambda pair: -len(pair[1]))
    for i, (ending, names) in enumerate(ranked):
        one = f"{UNREAD}: .{shown(ending)}" if i < _LISTED else f"{UNREAD}, one of many"
        tally.add(one, *names, count=len(names))


def _listed(endings: Sequence[str], members: int) -> str:
    """The first few endings of a list, for an error."""
    if not endings:
        return "no names with an ending" if members else "no members at all"
    more = len(endings) - _LISTED
    listed = ", ".join(f".{shown(ending)}" for ending in endings[:_LISTED])
    return listed + f" and {more:,} more endings" * (more > 0)
