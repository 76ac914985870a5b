"""Random access to WebDataset shards: plain tars in which `key.jpg`, `key.txt`, ... lie together.

The headers of every tar are read once, into an index of places; a row is then two or three reads.
So shards never constrain how rows are shuffled or split: they may be few, and of any size.
"""

from __future__ import annotations

import dataclasses
import difflib
import glob
import itertools
import json
import os
import re
import tarfile
from typing import Literal

import numpy as np

from clipx.data.base import BadSample, DataError, Example, Source

_ROLES = ("image", "txt", "json", "cls")  # what a member is to its sample
_PICTURES = ("jpg", "jpeg", "png", "webp")
_ROLE = dict.fromkeys(_PICTURES, 0) | {"txt": 1, "json": 2, "cls": 3}  # by extension
_ABSENT = -1
_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)")  # the key ends at the name's first dot


@dataclasses.dataclass(frozen=True)
class WebDataset(Source):
    """Samples of tar shards, in the order of the paths and of the members.

    A sample is a run of members with one key: a picture (jpg, jpeg, png, webp), captions in `.json`
    (`captions`, a list, or `caption`) or else in `.txt`, a label in `.cls`. Nothing is decoded
    here. A sample that lacks its picture or has no words is a `BadSample` when it is read. A shard
    that is missing, truncated, empty or of another kind raises `DataError` when the set is opened:
    a run that quietly leaves out half a shard cannot be told from one that does not.
    """

    path: str | tuple[str, ...]  # a tar, a glob, a brace range a-{000000..000005}.tar, or several
    truncated: Literal["refuse", "keep"] = "refuse"  # keep: use the whole samples of such a tar
    captions_key: str = "captions"  # a list in the json
    caption_key: str = "caption"  # a string in the json, where there is no list
    classes: tuple[str, ...] = ()  # names of the labels in .cls

    def __post_init__(self):
        patterns = (self.path,) if isinstance(self.path, str) else self.path
        shards = tuple(itertools.chain.from_iterable(map(_expand, patterns)))
        if not shards:
            raise DataError("data path: nothing given, expected a tar, a glob or a brace range")
        keys, owners, places = [], [], []
        for i, shard in enumerate(shards):
            for key, place in _index(shard, keep=self.truncated == "keep"):
                keys.append(key.encode("utf-8", "surrogateescape"))
                owners.append(i)
                places.append(place)
        # a few flat arrays: small, shared by forks, quick to pickle
        for name, value in (
            ("_shards", shards),
            ("_keys", b"".join(keys)),
            ("_key_ends", np.cumsum([len(key) for key in keys], dtype=np.int64)),
            ("_owners", np.array(owners, np.int32)),
            ("_places", np.array(places, np.int64)),  # [row, role, (offset, size)]
        ):
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        return len(self._owners)

    def __getitem__(self, row: int) -> Example:
        if not 0 <= row < len(self):
            raise IndexError(row)
        shard = self._shards[self._owners[row]]
        start = self._key_ends[row - 1] if row else 0
        name = self._keys[start : self._key_ends[row]].decode("utf-8", "backslashreplace")
        key = f"{os.path.basename(shard)}/{name}"
        try:
            # opened for each row: no descriptor to run out of, nothing to share or to pickle
            file = os.open(shard, os.O_RDONLY)
            try:
                image, text, meta, label = (
                    None if size == _ABSENT else os.pread(file, size, offset)
                    for offset, size in self._places[row].tolist()
                )
            finally:
                os.close(file)
        except OSError as error:
            raise BadSample(key, f"{shard} cannot be read ({error.strerror})") from None
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
        except ValueError as error:  # of json and of utf-8
            raise BadSample(key, f"the caption cannot be read ({error})") from None
        if found is None:
            if label is not None:
                return ()
            raise BadSample(key, "no caption (.txt or .json)")
        if not isinstance(found, list) or not all(isinstance(t, str) for t in found):
            raise BadSample(key, "the captions in .json are no list of strings")
        texts = tuple(t for t in (t.replace("\0", "").strip() for t in found) if t)
        if not texts:
            raise BadSample(key, "empty caption")
        return texts


def _label(key: str, data: bytes | None) -> int | None:
    try:
        return None if data is None else int(data)
    except ValueError:
        raise BadSample(key, f"the label in .cls is {data[:20]!r}, expected a number") from None


def _index(shard: str, *, keep: bool) -> list[tuple[str, list[tuple[int, int]]]]:
    """Key and places, (offset, size) by role, of each sample of one tar."""
    samples: list[tuple[str, list[tuple[int, int]]]] = []
    extensions: set[str] = set()
    last, whole = "", True
    try:
        with tarfile.open(shard, "r:") as tar:
            size = os.fstat(tar.fileobj.fileno()).st_size
            try:
                while (member := tar.next()) is not None:
                    tar.members = []  # it would keep them all
                    if member.offset_data + member.size <= size:
                        last = member.name
                    match = _NAME.fullmatch(member.name)
                    if not (member.isreg() and match):
                        continue
                    key, extension = match[1], match[2].lower()
                    extensions.add(extension)
                    if extension not in _ROLE:
                        continue
                    if not samples or samples[-1][0] != key:
                        samples.append((key, [(0, _ABSENT)] * len(_ROLES)))
                    place = samples[-1][1]
                    if place[_ROLE[extension]][1] == _ABSENT:
                        place[_ROLE[extension]] = (member.offset_data, member.size)
            except tarfile.ReadError:
                whole = False
            # tarfile takes a cut header for the end; the real end is a block of zeros
            tar.fileobj.seek(tar.offset)
            whole = whole and tar.fileobj.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
    except tarfile.ReadError:
        raise DataError(f"{shard}: {_what_else(shard)}") from None
    except OSError as error:
        raise DataError(f"{shard}: cannot be read ({error.strerror})") from None
    if not whole:
        samples = samples[:-1]  # the last one's members may be cut, or missing
        if not keep:
            raise DataError(
                f"{shard}: truncated or damaged; the last whole member is {last or 'none'}, "
                f"{len(samples)} whole samples are readable; copy the shard again, or set "
                "truncated='keep' to use those"
            )
    for what, roles, wanted in (
        ("pictures", (0,), ", ".join(f".{e}" for e in _PICTURES)),
        ("captions", (1, 2, 3), ".txt or .json, or labels in .cls"),
    ):
        if all(place[role][1] == _ABSENT for _, place in samples for role in roles):
            there = ", ".join(sorted(f".{e}" for e in extensions)) or "no members at all"
            raise DataError(f"{shard}: no {what}; found {there}, expected {wanted}")
    return samples


def _what_else(shard: str) -> str:
    """Why tarfile refuses the very start of a file, and what to do about it."""
    with open(shard, "rb") as file:
        start = file.read(tarfile.BLOCKSIZE)
    if not start:
        return "an empty file (0 bytes), expected a tar; copy the shard again"
    if start[:2] == b"\x1f\x8b" or start[:4] == b"\x28\xb5\x2f\xfd" or start[:3] == b"BZh":
        return "a compressed tar, expected a plain one (random access needs it); unpack it first"
    if len(start) < tarfile.BLOCKSIZE:
        return f"truncated to {len(start)} bytes, expected a tar; copy the shard again"
    return "not a tar"


def _expand(pattern: str) -> list[str]:
    """The files of one path, sorted within each brace. Raises `DataError` for a pattern without a
    match and for a brace range of which some files are missing."""
    full = os.path.expandvars(os.path.expanduser(pattern))
    alternatives = _braces(full)
    found = {one: sorted(glob.glob(one)) for one in alternatives}
    missing = [one for one, files in found.items() if not files]
    if len(missing) == len(alternatives):
        raise DataError(f"{pattern}: no file matches; {_nearest(alternatives[0])}")
    if missing:
        names = ", ".join(os.path.basename(one) for one in missing[:8])
        more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        raise DataError(
            f"{pattern}: {len(missing)} of {len(alternatives)} shards are missing: {names}{more}; "
            "copy them, or narrow the range"
        )
    return [file for files in found.values() for file in files]


def _braces(pattern: str) -> list[str]:
    """`pattern` with every {000..005} and {a,b} written out, as a shell does."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", pattern)
    if not match:
        return [pattern]
    if match[3] is not None:
        inside = match[3].split(",")
    else:
        width = len(match[1]) if match[1].startswith("0") else 0
        inside = [f"{i:0{width}d}" for i in range(int(match[1]), int(match[2]) + 1)]
        if not inside:
            raise DataError(f"{pattern}: {match[0]} is empty; write the smaller end first")
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [one for part in inside for one in _braces(head + part + tail)]


def _nearest(pattern: str) -> str:
    """What does exist near a path that matches nothing."""
    folder = os.path.dirname(pattern) or "."
    if not os.path.isdir(folder):
        while folder and folder != "/" and not os.path.isdir(folder):
            folder = os.path.dirname(folder)
        return f"the folder is not there either; what exists of it is {folder or '.'}"
    names = os.listdir(folder)
    wanted = os.path.basename(pattern)
    close = difflib.get_close_matches(wanted, names, n=3, cutoff=0.3) or sorted(names)[:3]
    return f"nearest in {folder}: " + (", ".join(close) or "nothing, the folder is empty")
