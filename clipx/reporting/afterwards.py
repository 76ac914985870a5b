"""What `clipx.evaluate` has written to a workdir, for its report."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NotRequired, TypedDict

from clipx.config import reading
from clipx.config.binding import find
from clipx.errors import ConfigError
from clipx.evaluators.base import Evaluator, declared
from clipx.training.metric_table import spelled
from clipx.types import Metric


class _Entry(TypedDict):
    dataset: str
    metrics: dict[str, float]
    eval: NotRequired[dict[str, Any]]
    sizes: NotRequired[dict[str, int]]
    chance: NotRequired[dict[str, float]]


class Row(NamedTuple):
    """One metric of an evaluation, formatted."""

    name: str
    data: str
    sizes: str  # what it is counted over
    step: str
    value: str
    chance: str  # "" if no number is known


def evaluations(workdir: pathlib.Path) -> list[Row]:
    """The metrics of all evaluations in a workdir's folders `evaluation_<step>`, in order of step.
    A file that `clipx.evaluate` has not written is passed over."""
    rows = []
    folders = [p for p in workdir.glob("evaluation_*") if p.name.rpartition("_")[2].isdecimal()]
    for folder in sorted(folders, key=lambda path: int(path.name.rpartition("_")[2])):
        step = f"{int(folder.name.rpartition('_')[2]):,}"
        step += ", averaged" * folder.name.startswith("evaluation_average_")
        for file in sorted(folder.glob("*.json")):
            try:
                rows += _rows(file.stem, reading.read_json(file, _Entry), step)
            except (OSError, ValueError):
                continue
    return rows


def _rows(stem: str, entry: _Entry, step: str) -> list[Row]:
    data = entry["dataset"]
    name = stem.removeprefix(f"{data}_")
    known = _by_benchmark_name((entry.get("eval") or {}).get("evaluator") or name)
    sizes, chance = entry.get("sizes", {}), entry.get("chance", {})
    rows = []
    for key, value in entry["metrics"].items():
        own, kind = known(key)
        if not kind.detail:
            at_chance = spelled(kind, chance[key]) if key in chance else ""
            cells = (data, spelled_sizes(sizes), step, spelled(kind, value), at_chance)
            rows.append(Row(f"{name}/{own}", *cells))
    return rows


def spelled_sizes(sizes: Mapping[str, int]) -> str:
    """What an evaluation is of, in words: "1,000 pictures, 5,000 captions"."""
    names = sorted(sizes, key=lambda name: name != "pictures")
    return ", ".join(f"{sizes[name]:,} {name}" for name in names)


def _by_benchmark_name(evaluator: str) -> Callable[[str], tuple[str, Metric]]:
    """A function from CLIP_benchmark's name of a metric, or clipx's own, to clipx's name and what
    it means."""
    try:
        metrics = find("evaluators", evaluator, Evaluator).metrics
    except (ConfigError, ImportError):
        return lambda key: (key, Metric())
    own = {known.benchmark: name for name, known in metrics.items() if known.benchmark}

    def known(key: str) -> tuple[str, Metric]:
        name = own.get(key, key)
        pattern = declared(metrics, name)
        return name, metrics[pattern] if pattern else Metric()

    return known
