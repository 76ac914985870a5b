"""What a data set is to clipx. Nothing in this folder imports JAX: workers start without it."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from clipx.errors import BadSample, DataError


def expand_user(path: str) -> str:
    """`path` with ~ and $NAME replaced. Raises `DataError` for a name that is not set."""
    full = os.path.expandvars(os.path.expanduser(path))
    for name in re.findall(r"\$\{?(\w+)", full):
        if name not in os.environ:
            raise DataError(
                f"{path}: the environment variable {name} is not set; "
                f"export {name}=... with the folder it stands for"
            )
    return full


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

    def keys(self) -> Iterator[str]:
        """The key of every row, in order. Sources that know their keys without reading pictures
        say so here; a key does not tell in which folder the data lies."""
        for row in range(len(self)):
            try:
                yield self[row].key
            except BadSample as error:
                yield error.key


def fingerprint(source: Source) -> str:
    """Twelve hexadecimal digits of the SHA-256 of the keys of all rows, in order: which examples a
    set has, wherever it lies."""
    digest, keys = hashlib.sha256(), source.keys()
    for key in keys:
        digest.update(key.encode("utf-8", "surrogateescape") + b"\n")
    return digest.hexdigest()[:12]
