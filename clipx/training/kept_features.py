"""Features of evaluated rows, kept in a folder: a tower that is frozen below its head computes them
once, for all evaluations of all runs that name the folder (`config.data.features.evals`)."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float

from clipx.data.base import expand_user
from clipx.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class KeptFeatures:
    """The features of one tower.

    Files are named by what they were computed from, so that one of other weights, settings or rows
    is never read. Each has the rows of one call.
    """

    folder: str
    about: tuple[Any, ...]  # of the tower: what its features depend on, apart from the rows

    def __call__(
        self, rows: np.ndarray, compute: Callable[[], Float[np.ndarray, "n c"]]
    ) -> Float[np.ndarray, "n c"]:
        """The features of `rows`, pictures or token ids: from the folder, or by `compute`, whose
        result is kept. Raises `ConfigError` for a folder that cannot be written."""
        file = pathlib.Path(expand_user(self.folder)) / f"{self._name(rows)}.npy"
        with contextlib.suppress(OSError, ValueError, EOFError):  # not there, or cut short
            found = np.load(file, allow_pickle=False)
            if found.ndim == 2 and len(found) == len(rows):
                return found
        found = compute()
        try:
            _write(file, found)
        except OSError as error:
            where, found = "config.data.features.evals", f"{file.parent}: {error.strerror}"
            raise ConfigError(where, found, "a folder that can be written") from None
        return found

    def _name(self, rows: np.ndarray) -> str:
        described = [*self.about, str(rows.dtype), rows.shape]
        digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
        digest.update(np.ascontiguousarray(rows).data)
        return digest.hexdigest()[:32]


def _write(file: pathlib.Path, rows: np.ndarray) -> None:
    """Writes a file in one piece: runs that share the folder may read it at any time."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(f".{os.getpid()}")
    with open(unfinished, "wb") as part:
        np.save(part, rows)
    os.replace(unfinished, file)
