"""What a data set is to clipx. Nothing in this folder imports JAX: workers start without it."""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np


class DataError(Exception):
    """The data is not what the config says; shown as one line, exit code 2."""


class BadSample(Exception):
    """One example cannot be used: `key` says which, the message why."""

    def __init__(self, key: str, reason: str):
        super().__init__(key, reason)
        self.key, self.reason = key, reason

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}"


class Example(NamedTuple):
    image: bytes | np.ndarray  # an encoded picture, or uint8 pixels [h, w, 3]
    texts: tuple[str, ...]  # at least one caption; () for a set that has labels alone
    row: int  # stable id: the place in the source
    key: str  # what a person would look for: the file's or member's name
    label: int | None = None  # index into the source's `classes`


@runtime_checkable
class Source(Protocol):
    """Random access to examples. One subclass a file; the file's name is the config's name.

    A source is a frozen dataclass whose fields are its config keys; it opens its files when built
    (never on import), raises `DataError` for what is wrong with the set and `BadSample` from
    `__getitem__` for what is wrong with one example. It pickles, and reads from many threads.
    """

    classes: tuple[str, ...]  # names of the labels; () where the set has none

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Example: ...
