"""Which checkpoint of a run is the best by a metric."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from clipx.training import metric_table, metrics
from clipx.types import Metric


class Scores:
    """The values of one metric at the steps of a run.

    A checkpoint stores the metrics of its state. Where it stores none, as those of clipx 0.1, the
    line of metrics.jsonl with the same step tells.
    """

    def __init__(self, workdir: pathlib.Path, name: str, evals: Mapping[str, Any]):
        self.name = name
        self._metric = metric_table.metric(name, evals) if name else Metric()
        rows = metrics.read(workdir) if name else []
        self._logged = {row["step"]: row[name] for row in rows if _finite(row.get(name))}

    def best(self, stored: Mapping[int, Mapping[str, float] | None]) -> tuple[int, float] | None:
        """The best (step, value) of checkpoints; None if none has a finite value.

        stored: the metrics that each checkpoint stores, by its step.
        """
        values = {step: (kept or {}).get(self.name) for step, kept in stored.items()}
        points = [
            (step, self._logged.get(step) if value is None else value)
            for step, value in sorted(values.items())
        ]
        return self._best([(step, value) for step, value in points if _finite(value)])

    def logged(self) -> tuple[int, float] | None:
        """The best (step, value) of metrics.jsonl, with a checkpoint or without."""
        return self._best(sorted(self._logged.items()))

    def _best(self, points: Sequence[tuple[int, Any]]) -> tuple[int, float] | None:
        return metric_table.best(self._metric, points) if points else None

    def better(self, value: float, other: float) -> bool:
        """Whether `value` is better than `other`."""
        return value < other if self._metric.better == "less" else value > other


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
