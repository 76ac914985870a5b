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

import jax
import numpy as np
from jaxtyping import Float

from clipx.data.base import expand_user
from clipx.data.config import DataConfig
from clipx.data.text.tokenizers import Tokenizer
from clipx.errors import ConfigError
from clipx.objectives.base import Objective
from clipx.training import stored
from clipx.types import TrainState


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


def keeping(objective: Objective, data: DataConfig, workdir: pathlib.Path) -> DataConfig:
    """The data of a run in `workdir`, with its own folder for the features of evaluated rows if a
    tower has `cache` and the config names no other."""
    if data.features.evals or not any(getattr(objective, name).cache for name in stored.TOWERS):
        return data
    folder = str(workdir / stored.FOLDER / "evals")
    return dataclasses.replace(data, features=dataclasses.replace(data.features, evals=folder))


def kept(
    objective: Objective, data: DataConfig, tokenizer: Tokenizer, state: TrainState
) -> dict[str, KeptFeatures]:
    """The features of evaluated rows that `config.data.features.evals` keeps, by tower: of those
    that are frozen below their heads. None in a run of several processes, which all would have to
    find the same files, and none for an objective that compares tokens."""
    folder = data.features.evals
    if not folder or jax.process_count() > 1 or objective.reads_tokens:
        return {}
    return {
        name: KeptFeatures(
            folder,
            (
                name,
                stored.digest(state, name),
                stored.preprocessing(objective, name, tokenizer, data.framing),
            ),
        )
        for name in objective.locked_features
    }


def _write(file: pathlib.Path, rows: np.ndarray) -> None:
    """Writes a file in one piece: runs that share the folder may read it at any time."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(f".{os.getpid()}")
    with open(unfinished, "wb") as part:
        np.save(part, rows)
    os.replace(unfinished, file)
