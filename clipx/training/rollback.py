"""Going back from steps that were not finite: to a checkpoint, and on without their rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from clipx.errors import RunError

# steps in a row that were not finite, with this process's rows: (step, [(row id, key), ...])
Skipped = list[tuple[int, list[tuple[int, str]]]]


class NotFinite(Exception):
    """Too many steps in a row were not finite."""


@dataclasses.dataclass(frozen=True)
class Rollback:
    """What a run remembers of the times that it went back. It is a part of every checkpoint, so
    that the order of rows stays a function of (seed, step, this)."""

    left_out: frozenset[int] = frozenset()  # row ids that are no longer trained on
    back: int | None = None  # the step that the run last went back to

    @classmethod
    def of(cls, saved: Mapping[str, Any] | None) -> Rollback:
        """What the JSON of a checkpoint holds; None or old JSON: a run that never went back."""
        kept = (saved or {}).get("rollback") or {}
        return cls(frozenset(kept.get("left_out", ())), kept.get("back"))

    def dump(self) -> dict[str, Any]:
        """JSON, which `of` reads; {} for a run that never went back."""
        if self.back is None:
            return {}
        return {"rollback": {"left_out": sorted(self.left_out), "back": self.back}}

    def after(self, skipped: Skipped, back: int, rows: int) -> Rollback:
        """This, once the run has gone back to step `back` because of the `skipped` steps. rows: of
        the training data. All processes call it together. Raises `RunError` if going back once more
        would not help."""
        if back == self.back:
            raise RunError(
                f"steps are not finite again after the run went back to step {back:,} and left out "
                f"{len(self.left_out):,} rows (config.train.rollback): the rows are not the cause. "
                "A smaller config.optimizer.learning_rate, config.optimizer.clip_norm=1.0 or "
                "dtype=float32 of the towers may help"
            )
        left_out = self.left_out | _everywhere([row for _, batch in skipped for row, _ in batch])
        if len(left_out) > rows // 2:
            raise RunError(
                f"going back (config.train.rollback) would leave out {len(left_out):,} of {rows:,} "
                "rows, more than half: the rows are not the cause, or "
                "config.train.max_skipped_steps is too large for so few rows"
            )
        return Rollback(left_out, back)


def _everywhere(rows: Sequence[int]) -> frozenset[int]:
    """These rows, and those of all other processes."""
    own = np.asarray(rows, np.int32)
    if jax.process_count() > 1:
        own = multihost_utils.process_allgather(own)  # as many in every process
    return frozenset(np.unique(own).tolist())
