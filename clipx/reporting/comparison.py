"""Compares runs: the last metrics of their evals, in one table."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from clipx.config import reading
from clipx.errors import damaged_file
from clipx.reporting import page
from clipx.training import guesses, metrics
from clipx.training.metric_table import metric
from clipx.training.run import assemble
from clipx.training.session import resolved
from clipx.training.workdir import read_json, refuse_other_config


class _Config(TypedDict):
    evals: dict[str, Any]


def finished(folder: pathlib.Path, config: dict[str, Any]) -> bool:
    """Whether a workdir holds a finished run of exactly this config, evals included. Raises
    `ConfigError` if it holds a run of another config."""
    if not (folder / page.FILE).exists():  # a run writes its report last
        return False
    complete = assemble(resolved(config, str(folder), say=lambda line: None)).complete
    refuse_other_config(folder, complete)
    evals = guesses.fill(complete, guesses.read(folder))["evals"]
    return _evals(folder) == evals


def cells(folder: pathlib.Path) -> dict[str, str]:
    """The metrics of a workdir's evals at the last step that has any, formatted, by column
    heading."""
    evals = _evals(folder)
    return columns(results(metrics.read(folder), evals), evals)


def _evals(folder: pathlib.Path) -> dict[str, Any]:
    """The evals of a workdir's config. Raises `ConfigError`."""
    path = folder / "config.json"
    try:
        return reading.shaped(read_json(path), _Config)["evals"]
    except ValueError as error:
        raise damaged_file(path, error) from None


def results(rows: Sequence[Mapping[str, Any]], evals: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of `evals` at the last step that has any. rows: of metrics.jsonl."""
    steps: dict[int, dict[str, float]] = {}
    names = tuple(f"{name}/" for name in evals)
    for row in rows:
        if scores := {key: value for key, value in row.items() if key.startswith(names)}:
            # a finished run may be evaluated again, which adds a row for the same step
            steps.setdefault(row["step"], {}).update(scores)
    return steps[max(steps)] if steps else {}


def columns(scores: Mapping[str, float], evals: Mapping[str, Any]) -> dict[str, str]:
    """Cells by column heading: first those that several metrics share, such as the recalls of a
    direction, then those of one metric each. Percentages have no percent sign."""
    shared: dict[str, list[tuple[str, str]]] = {}
    alone: dict[str, str] = {}
    for key, value in scores.items():
        if not (kind := metric(key, evals)).column:
            continue
        heading = f"{key.rpartition('/')[0]} {kind.column}"
        cell = f"{100 * value:.1f}" if kind.shown == "percent" else f"{value:.3f}"
        if kind.label:
            shared.setdefault(heading, []).append((kind.label, cell))
        else:
            alone[heading] = cell
    joined = {}
    for heading, labelled in shared.items():
        labels, values = zip(*sorted(labelled, key=lambda pair: int(pair[0])))
        joined[heading + " / ".join(labels)] = " / ".join(values)
    return joined | alone


def table(rows: Mapping[str, Mapping[str, str]]) -> list[str]:
    """The lines of a Markdown table. rows: name -> (heading -> cell); missing cells are empty."""
    heads = list(dict.fromkeys(head for cells in rows.values() for head in cells))
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for name, cells in rows.items():
        lines.append(f"| {name} | " + " | ".join(cells.get(head, "") for head in heads) + " |")
    return lines
