"""Pictures of a test set that are in the training set too, as they are or nearly."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int, UInt8, UInt64
from PIL import Image

from clipx.data import pictures
from clipx.data.base import Source
from clipx.data.threads import in_order
from clipx.errors import BadSample

_SIDE = 8  # of the grey picture that is compared
# Of 128 bits. Among 6 million pairs of different photographs (Flickr8k's) none is as near; a new
# JPEG at quality 20, half the size or another brightness stays nearer in 99 of 100.
_BITS = 14
_LIKENESS = 0.95  # correlation of the grey pictures, which tells flat pictures apart
_FLAT = 4  # grey levels; pictures as flat as this have no correlation
_PAIRS = 1 << 25  # compared at once
_SHOWN = 5  # examples of each kind
KINDS = ("equal bytes", "equal pixels", "nearly equal pixels")


class Print(NamedTuple):
    """What is compared of one picture."""

    data: int  # a hash of its bytes
    pixels: int  # a hash of its pixels
    bits: UInt64[np.ndarray, " 2"]  # whether grey rises to the right and downwards (dHash)
    grey: UInt8[np.ndarray, " 64"]


class Prints(NamedTuple):
    """The prints of all pictures of a source that can be decoded."""

    rows: Int[np.ndarray, " n"]
    data: UInt64[np.ndarray, " n"]
    pixels: UInt64[np.ndarray, " n"]
    bits: UInt64[np.ndarray, "n 2"]
    grey: UInt8[np.ndarray, "n 64"]


def against(
    train: Sequence[Source], test: Source, progress: Callable[[int], Any] | None = None
) -> dict[str, Any]:
    """A report that can be stored as JSON: how many pictures of `test` are in one of `train`.

    Its keys are `pictures` (of the test set), `bad` (those that cannot be decoded), and `KINDS`.
    Each kind has a `count` of test pictures, which are in no kind before it, and `examples`: pairs
    of the key in the test set and the key in the training set. `progress(n)` is called after every
    n rows of either. Needs about 100 bytes of memory per row.
    """
    tested = prints(test, progress)
    kinds = np.full(len(tested.rows), len(KINDS))  # of each test picture; the last: none
    where = np.zeros((len(kinds), 2), int)  # the part of `train`, and the row in it
    for part, source in enumerate(train):
        trained = prints(source, progress)
        for kind, (picture, match) in _matches(tested, trained):
            if kind < kinds[picture]:
                kinds[picture], where[picture] = kind, (part, trained.rows[match])
    report: dict[str, Any] = {"pictures": len(kinds), "bad": len(test) - len(kinds)}
    for kind, name in enumerate(KINDS):
        found = np.flatnonzero(kinds == kind)
        shown = [
            [test[int(tested.rows[i])].key, train[where[i, 0]][int(where[i, 1])].key]
            for i in found[:_SHOWN]
        ]
        report[name] = {"count": len(found), "examples": shown}
    return report


def prints(source: Source, progress: Callable[[int], Any] | None = None) -> Prints:
    """The prints of the pictures of a source, in row order."""
    found = list(in_order(functools.partial(_print, source), len(source), progress))
    kept = [one for one in found if one is not None]
    return Prints(
        np.array([row for row, one in enumerate(found) if one is not None], int),
        np.array([one.data for one in kept], np.uint64),
        np.array([one.pixels for one in kept], np.uint64),
        np.array([one.bits for one in kept], np.uint64).reshape(-1, 2),
        np.array([one.grey for one in kept], np.uint8).reshape(-1, _SIDE**2),
    )


def _print(source: Source, row: int) -> Print | None:
    """The print of a row's picture; None if it cannot be decoded."""
    try:
        example = source[row]
        pictures.header(example, source.limits)
        pixels = pictures.decode(example)
    except BadSample:
        return None
    grey = Image.fromarray(pixels).convert("L")

    def small(width: int, height: int) -> Int[np.ndarray, "h w"]:
        return np.asarray(grey.resize((width, height), Image.Resampling.BOX), int)

    right, down = np.diff(small(_SIDE + 1, _SIDE), axis=1), np.diff(small(_SIDE, _SIDE + 1), axis=0)
    bits = np.packbits(np.concatenate([(right > 0).ravel(), (down > 0).ravel()]))
    return Print(
        pictures.digest(pictures.raw(example)),
        pictures.digest(str(pixels.shape).encode() + pixels.tobytes()),
        bits.view(np.uint64),
        small(_SIDE, _SIDE).astype(np.uint8).ravel(),
    )


def _matches(test: Prints, train: Prints) -> Iterator[tuple[int, tuple[int, int]]]:
    """Yields (index in `KINDS`, (index in `test`, index in `train`)), one for each test picture and
    kind that has a match: the first in the training set, or the nearest."""
    for kind, name in enumerate(("data", "pixels")):
        values, first = np.unique(getattr(train, name), return_index=True)
        wanted = getattr(test, name)
        for picture in np.flatnonzero(np.isin(wanted, values)):
            yield kind, (int(picture), int(first[np.searchsorted(values, wanted[picture])]))
    if not len(train.rows):
        return
    size = max(1, _PAIRS // len(train.rows))
    for start in range(0, len(test.rows), size):
        apart = sum(
            np.bitwise_count(test.bits[start : start + size, None, word] ^ train.bits[:, word])
            for word in range(2)
        )
        apart = np.asarray(apart)
        for picture in np.flatnonzero(apart.min(axis=1) <= _BITS):
            near = np.flatnonzero(apart[picture] <= _BITS)
            alike = near[_alike(test.grey[start + picture], train.grey[near])]
            if len(alike):
                nearest = alike[np.argmin(apart[picture][alike])]
                yield 2, (start + int(picture), int(nearest))


def _alike(grey: UInt8[np.ndarray, " 64"], others: UInt8[np.ndarray, "n 64"]) -> np.ndarray:
    """Whether each of `others` is the same picture as `grey`, up to brightness and contrast."""
    a, b = _centred(grey[None]), _centred(others)
    scale = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    same = np.abs(grey.astype(int) - others).max(axis=1) <= _FLAT
    return same | ((a * b).sum(axis=1) > np.where(scale, _LIKENESS * scale, np.inf))


def _centred(grey: UInt8[np.ndarray, "n 64"]) -> Float32[np.ndarray, "n 64"]:
    values = grey.astype(np.float32)
    return values - values.mean(axis=1, keepdims=True)


def table(report: dict[str, Any]) -> list[str]:
    """The report as lines for a terminal."""
    total = sum(report[kind]["count"] for kind in KINDS)
    bad = f" ({report['bad']:,} more cannot be decoded)" if report["bad"] else ""
    lines = [f"{total:,} of {report['pictures']:,} test pictures are in the training set{bad}"]
    for kind in KINDS:
        count, examples = report[kind]["count"], report[kind]["examples"]
        if count:
            lines.append(f"  {count:,} with {kind}, such as (test = training)")
            lines += [f"    {test} = {train}" for test, train in examples]
    return lines
