"""Rows of the training data that a run keeps apart, to evaluate on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar, NamedTuple

import numpy as np
from jaxtyping import Int, UInt64

from clipx.data import pictures
from clipx.data.base import Account, Example, Guess, Source, fingerprint
from clipx.data.config import DataConfig
from clipx.data.limits import Limits
from clipx.data.order import Subset, chosen
from clipx.data.threads import in_order
from clipx.errors import BadSample, ConfigError

_MOST = 1000  # rows that "auto" holds out
_FEW = 20  # pictures; the recall among fewer says little
_READ = 100_000  # rows of which "auto" reads every picture
_WHERE = "config.data.holdout"


class HeldOut:
    """The pictures that a run holds out of `source`: each once, with the captions of all its rows.

    Examples keep the row id and the key of the picture's first row. Not a subclass of `Source`,
    because no config selects it by name.
    """

    alike: ClassVar[bool] = False

    def __init__(self, source: Source, groups: Sequence[Int[np.ndarray, " n"]]):
        """groups: the rows of each picture, in their order."""
        self._source, self._groups = source, groups
        self.classes, self.limits = source.classes, source.limits

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, row: int) -> Example:
        return self._merged(row, self._source.__getitem__)

    def glance(self, row: int) -> Example:
        return self._merged(row, self._source.glance)

    def _merged(self, row: int, read: Callable[[int], Example]) -> Example:
        first, *others = map(read, self._groups[row].tolist())
        texts = dict.fromkeys(text for example in (first, *others) for text in example.texts)
        return first._replace(texts=tuple(texts))

    @property
    def rows(self) -> Int[np.ndarray, " n"]:
        """All rows of these pictures, ascending."""
        return np.sort(np.concatenate(self._groups))

    def keys(self) -> Iterator[str]:
        keys = list(self._source.keys())
        return (keys[group[0]] for group in self._groups)

    def limit(self, limits: Limits) -> None:
        self._source.limit(limits)
        self.limits = limits

    def account(self) -> Account | None:
        return None  # the training data has the account of these files

    def guesses(self) -> tuple[Guess, ...]:
        return ()


class Parts(NamedTuple):
    """A data set, divided into what a run trains on and what it evaluates on."""

    train: Source
    rows: Int[np.ndarray, " n"] | None  # of the data set, that `train` has; None: all
    held_out: HeldOut | None  # None: nothing is held out

    def describe(self, data: Source, evals: Sequence[str]) -> list[str]:
        """A line about the rows that are held out of `data` for `evals`, if any."""
        if self.held_out is None:
            return []
        count, rows = len(self.held_out), len(self.held_out.rows)
        few = ", too few to compare models by" * (count < _FEW)
        readers = ", ".join(f"evals.{name}" for name in evals) or "no eval"
        line = (
            f"held out {rows:,} of {len(data):,} rows ({count:,} pictures{few}) for {readers}: "
            f"never trained on. {_WHERE} sets how many"
        )
        other = [f"config.evals.{name}.data.path names a set of its own" for name in evals[:1]]
        return [", ".join([line, *other])]

    def checked(self, rows: int, trained: str, name: str) -> HeldOut:
        """The rows that are held out for the eval `name` of a run that has trained.

        rows, trained: the number and the fingerprint of the rows that it trained on; "" is not
        known. Raises `ConfigError` if `train` are other rows.
        """
        assert self.held_out is not None  # the eval reads them
        now = fingerprint(self.train)
        if trained not in ("", now):
            raise ConfigError(
                f"config.evals.{name}.data",
                "no path, so rows of config.data would be held out; that leaves "
                f"{len(self.train):,} rows with fingerprint {now}",
                f"the {rows:,} rows that the run trained on, with fingerprint {trained}",
                "the data as it was then, or data of its own for the eval: "
                f"--evals={name} --data=source=...,path=...",
            )
        return self.held_out


def split(data: Source, config: DataConfig, evals: Sequence[str]) -> Parts:
    """Divides the data of a run. `evals`: the names of its evals that read held-out rows.

    The rows to hold out are chosen from all rows, before `data.fraction` takes its share of the
    others. Raises `ConfigError` for data of which nothing can be held out.
    """
    count = _count(len(data), config, evals)
    train, rows, held_out = data, None, None
    if count:
        held_out = hold_out(data, count)
        rows = np.setdiff1d(np.arange(len(data)), held_out.rows)
        guess = Guess("holdout", count, f"evals.{evals[0]}.data has no path") if evals else None
        guesses = (guess,) if guess and config.holdout == "auto" else ()
        train = Subset(data, rows, guesses)
    if config.fraction < 1:
        share = chosen(len(train), config.fraction)
        rows = share if rows is None else rows[share]
        train = Subset(train, share)
    return Parts(train, rows, held_out)


def _count(rows: int, config: DataConfig, evals: Sequence[str]) -> int:
    """How many of the rows to hold out."""
    name = f"--config.evals.{evals[0]}.data.path=..." if evals else ""
    if config.holdout == "auto":
        if not evals:
            return 0
        if rows > _READ:
            raise ConfigError(
                _WHERE,
                f"'auto' with {rows:,} rows: choosing from them reads every picture",
                f"at most {_READ:,} rows",
                f"name the eval's data with {name}, or read them all with {_WHERE}={_MOST}",
            )
        count = max(1, min(rows // 10, _MOST))
    else:
        count = config.holdout
    if count >= rows:
        raise ConfigError(
            _WHERE,
            f"{count:,} of {rows:,} rows",
            "fewer rows than the data has",
            f"name the eval's data with {name}" if evals else f"{_WHERE}=0",
        )
    return count


def hold_out(source: Source, count: int) -> HeldOut:
    """At most `count` rows of `source`, and at least one picture.

    Pictures are taken in the order of a hash of their bytes, each with all of its rows. Rows that
    cannot be used stay with the others.
    """
    digests, usable = _digests(source)
    rows = np.flatnonzero(usable)
    rows = rows[np.argsort(digests[rows], kind="stable")]
    groups = np.split(rows, np.flatnonzero(np.diff(digests[rows])) + 1) if len(rows) else []
    if len(groups) < 2:
        raise ConfigError(
            _WHERE,
            f"{len(source):,} rows with {len(groups)} usable picture(s)",
            "at least two different pictures with captions",
            "python -m clipx.dataset verify lists every bad row",
        )
    taken: list[np.ndarray] = []
    left = max(count, min(map(len, groups)))
    for group in groups:
        if len(group) <= left and len(taken) < len(groups) - 1 and _decodes(source, group[0]):
            taken.append(group)
            left -= len(group)
        if not left:
            break
    if not taken:
        raise ConfigError(
            _WHERE,
            "no picture that can be decoded",
            "at least one",
            "python -m clipx.dataset verify",
        )
    return HeldOut(source, sorted(taken, key=lambda group: group[0]))


def _digests(source: Source) -> tuple[UInt64[np.ndarray, " n"], np.ndarray]:
    """(a hash of each row's picture, whether the row has a picture and captions)."""

    def digest(row: int) -> int | None:
        try:
            example = source[row]
        except BadSample:
            return None
        return pictures.digest(pictures.raw(example)) if example.texts else None

    found = list(in_order(digest, len(source)))
    usable = np.array([one is not None for one in found], bool)
    return np.array([one or 0 for one in found], np.uint64).byteswap(), usable


def _decodes(source: Source, row: int) -> bool:
    try:
        example = source[int(row)]
        pictures.header(example, source.limits)
        pictures.decode(example)
    except BadSample:
        return False
    return True
