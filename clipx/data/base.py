"""The interface of a data set. No file of this folder imports JAX: data workers run without it."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import numpy as np

from clipx.config import secrets
from clipx.data.limits import Limits
from clipx.errors import BadSample, DataError

# half a surrogate pair, but for those that stand for a byte of a file's name
_HALF_PAIR = re.compile("[\ud800-\udc7f\udd00-\udfff]")


def expand_user(path: str) -> str:
    """`path` with ~ and $NAME expanded. Raises `DataError` for a variable that is not set."""
    try:
        return secrets.expand(path)
    except secrets.MissingVariable as error:
        fix = f"set it first: export {error.name}=FOLDER"
        raise DataError(f"{path}: {error}; {fix}") from None


def printable(name: str) -> str:
    """A name with bytes that are no UTF-8 as \\xff, and with halves of surrogate pairs, which JSON
    can contain, as \\ud83d."""
    try:
        return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:
        return printable(_HALF_PAIR.sub(lambda half: ascii(half[0])[1:-1], name))


class Example(NamedTuple):
    """One row of a data set."""

    image: bytes | np.ndarray  # an encoded image, or uint8 pixels [h, w, 3]
    texts: tuple[str, ...]  # at least one caption; () if the data set only has labels
    row: int  # stable id: the row's index in the source
    key: str  # a name that a person can search for, such as the file's
    label: int | None = None  # index into the source's `classes`


class Skipped(NamedTuple):
    """Items of a data set's files that are part of no row, for one reason."""

    reason: str  # such as "an ending that is not read"
    count: int  # pyright: ignore[reportIncompatibleMethodOverride]  # hides the method of tuples
    examples: tuple[str, ...]  # the names of the first few


@dataclasses.dataclass(frozen=True)
class Account:
    """What became of every item of a data set's files: it is part of a row, or it was skipped.

    Raises `ValueError` if the numbers do not add up.
    """

    unit: str  # what is counted, in the plural: "members", "lines"
    found: int  # all items of the files
    used: int  # those that are part of a row
    skipped: tuple[Skipped, ...] = ()

    def __post_init__(self) -> None:
        if self.found != self.used + sum(s.count for s in self.skipped):
            raise ValueError(f"the account does not add up: {self}")

    def lines(self) -> list[str]:
        """The account in words, if anything was skipped: a line, and one more for each reason."""
        if not self.skipped:
            return []
        left_out = self.found - self.used
        return [f"{left_out:,} of {self.found:,} {self.unit} left out:"] + [
            f"  {s.count:,}: {s.reason}"
            + (f" ({', '.join(s.examples)}{', ...' * (s.count > len(s.examples))})")
            * bool(s.examples)
            for s in self.skipped
        ]


class Guess(NamedTuple):
    """A setting that the config leaves open, and that a source took from what its files hold."""

    # the key of the source's section, which holds None, "", () or "auto" where it is left open;
    # "parts.a.image_column" in a mixture
    field: str
    value: Any  # what was taken, as config.json holds it
    reason: str  # a few words, such as "the only column with paths"


@runtime_checkable
class Source(Protocol):
    """Random access to the examples of a data set.

    Each file in `clipx/data/sources/` holds one subclass, and a config selects it by the file's
    name. A subclass is a frozen dataclass whose fields are its config keys. It opens its files in
    the constructor, never on import. It raises `DataError` if the data set is unusable, and
    `BadSample` from `__getitem__` if one example is, or `StorageError` if its file is no longer as
    it was when the source was opened. It can be pickled and read by many threads.
    """

    classes: tuple[str, ...]  # names of the labels; () if the data set has no labels
    # True: rows are made, not read, so that a look at a few is a look at all
    alike: ClassVar[bool] = False
    limits: Limits = Limits()  # a row beyond them is bad; no key of the source

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Example: ...

    def limit(self, limits: Limits) -> None:
        """Sets the limits of the rows. A source that reads others sets theirs."""
        object.__setattr__(self, "limits", limits)  # sources are frozen dataclasses

    def keys(self) -> Iterator[str]:
        """The key of every row, in order.

        This default reads every example. A source that knows its keys without reading images
        overrides it. Keys must not depend on the folder in which the data is stored.
        """
        for row in range(len(self)):
            try:
                yield self[row].key
            except BadSample as error:
                yield error.key

    def glance(self, row: int) -> Example:
        """The example of a row, for a look at many rows: a source that can read captions and
        labels without the picture leaves its bytes out (b""). Raises `BadSample` as indexing does.
        """
        return self[row]

    def account(self) -> Account | None:
        """What became of every item of the files; None if nothing can be left out."""
        return None

    def guesses(self) -> tuple[Guess, ...]:
        """The settings that were guessed when the source was opened."""
        return ()


def fingerprint(source: Source) -> str:
    """The first twelve hex digits of the SHA-256 of all keys, in row order.

    It identifies the examples of a data set, independent of where the data is stored.
    """
    digest, keys = hashlib.sha256(), source.keys()
    for key in keys:
        digest.update(key.encode("utf-8", "surrogateescape") + b"\n")
    return digest.hexdigest()[:12]
