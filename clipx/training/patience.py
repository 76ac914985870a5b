"""Stops a run whose best metric gets no better."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from clipx.training import metric_table
from clipx.types import Metric


@dataclasses.dataclass
class Patience:
    """Counts evaluations in which `train.best` was no better than before.

    evaluations: so many in a row end the run; None: never. values: the metric at the steps so far.
    """

    name: str
    evaluations: int | None
    metric: Metric
    values: dict[int, float]

    @classmethod
    def of(
        cls,
        name: str,
        evaluations: int | None,
        evals: Mapping[str, Any],
        rows: Sequence[Mapping[str, Any]],
        start: int,
    ) -> Patience:
        """rows: of metrics.jsonl; those after the step `start` do not count. evals: the config's
        section."""
        known = metric_table.metric(name, evals) if name else Metric()
        values = {row["step"]: row[name] for row in rows if name in row and row["step"] <= start}
        return cls(name, evaluations, known, values)

    def over(self, step: int, results: Mapping[str, float]) -> str:
        """Why the run ends at `step`, whose evals gave `results`; "" if it goes on."""
        if self.evaluations is None or self.name not in results:
            return ""
        self.values[step] = results[self.name]
        points = [(s, x) for s, x in sorted(self.values.items()) if s <= step]
        best, value = metric_table.best(self.metric, points)
        since = [s for s, _ in points if s > best]
        if len(since) < self.evaluations:
            return ""
        spelled = metric_table.spelled(self.metric, value)
        return (
            f"stopped early at step {step:,}: {self.name} was best at step {best:,} ({spelled}), "
            f"and no better in {len(since)} evaluation(s) since"
        )
