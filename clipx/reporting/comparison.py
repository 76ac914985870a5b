"""Compares runs: the last metrics of their evals, in one table."""

from __future__ import annotations

import math
import pathlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NotRequired, TypedDict

from clipx.config import binding, reading
from clipx.errors import damaged_file
from clipx.reporting import page
from clipx.training import guesses, metrics
from clipx.training.metric_table import metric
from clipx.training.run import assemble
from clipx.training.session import resolved
from clipx.training.workdir import read_json, refuse_other_config


class _Config(TypedDict):
    evals: dict[str, Any]
    seed: NotRequired[int]


class Result(NamedTuple):
    """What a run has come to."""

    seed: int
    scores: Mapping[str, float]  # the metrics of its evals at the last step that has any
    evals: Mapping[str, Any]  # the section of its config, which says what the metrics mean
    pairs: int  # that it has seen


def result(folder: pathlib.Path) -> Result:
    """The result of the run in a workdir. Raises `ConfigError` for a damaged file of it."""
    config, rows = _config(folder), metrics.read(folder)
    pairs = max((row.get("examples", 0) for row in rows), default=0)
    return Result(config.get("seed", 0), results(rows, config["evals"]), config["evals"], pairs)


def finished(folder: pathlib.Path, config: dict[str, Any]) -> bool:
    """Whether a workdir holds a finished run of exactly this config, evals included. Raises
    `ConfigError` if it holds a run of another config."""
    if not (folder / page.FILE).exists():  # a run writes its report last
        return False
    complete = assemble(resolved(config, str(folder), say=lambda line: None)).complete
    refuse_other_config(folder, complete)
    evals = guesses.fill(complete, guesses.read(folder))["evals"]
    return evals_of(folder) == evals


def cells(runs: Sequence[Result], budget: str = "pairs") -> dict[str, str]:
    """The metrics of some runs that differ in their seed alone: formatted, by column heading.
    budget: what runs spend equally; for another than pairs the first column says how many pairs
    they saw."""
    found: dict[str, list[float]] = {}
    for run in runs:
        for key, value in run.scores.items():
            found.setdefault(key, []).append(value)
    seen = {} if budget == "pairs" else {"pairs seen": f"{runs[0].pairs:,}"}
    return seen | columns(found, runs[0].evals)


def evals_of(folder: pathlib.Path) -> dict[str, Any]:
    """The evals of a workdir's config. Raises `ConfigError`."""
    return _config(folder)["evals"]


def _config(folder: pathlib.Path) -> _Config:
    path = folder / "config.json"
    try:
        return reading.shaped(read_json(path), _Config)
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


def with_seconds(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl with `seconds`: those that training has taken so far, which is the
    steps and the passes before an episode's steps. Evaluations and compiling are not counted."""
    seconds, step, out = 0.0, 0, []
    for row in rows:
        if math.isfinite(taken := row.get("step_seconds", math.nan)):
            seconds += taken * max(row["step"] - step, 0)
            step = row["step"]
        if math.isfinite(taken := row.get("episode/seconds", math.nan)):
            seconds += taken
        out.append({**row, "seconds": seconds})
    return out


def columns(scores: Mapping[str, Sequence[float]], evals: Mapping[str, Any]) -> dict[str, str]:
    """Cells by column heading: first those that several metrics share, such as the recalls of a
    direction, then those of one metric each. Percentages have no percent sign. scores: the values
    of each metric, one for each seed."""
    shared: dict[str, list[tuple[str, str]]] = {}
    alone: dict[str, str] = {}
    for key, values in scores.items():
        if not (kind := metric(key, evals)).column:
            continue
        heading = f"{key.rpartition('/')[0]} {kind.column}"
        cell = spread(values, _percent if kind.shown == "percent" else "{:.3f}".format)
        if kind.label:
            shared.setdefault(heading, []).append((kind.label, cell))
        else:
            alone[heading] = cell
    joined = {}
    for heading, labelled in shared.items():
        labels, values = zip(*sorted(labelled, key=lambda pair: int(pair[0])))
        joined[heading + " / ".join(labels)] = " / ".join(values)
    return joined | alone


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def spread(values: Sequence[float], spell: Callable[[float], str]) -> str:
    """One value, or the mean of several with the least and the most: `5.4 (5.1 to 5.8)`."""
    mean = spell(statistics.fmean(values))
    if len(values) == 1:
        return mean
    return f"{mean} ({spell(min(values))} to {spell(max(values))})"


def table(rows: Mapping[str, Mapping[str, str]]) -> list[str]:
    """The lines of a Markdown table. rows: name -> (heading -> cell); missing cells are empty."""
    heads = list(dict.fromkeys(head for cells in rows.values() for head in cells))
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for name, cells in rows.items():
        lines.append(f"| {name} | " + " | ".join(cells.get(head, "") for head in heads) + " |")
    return lines


def differences(configs: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """(key, its value in each config) of all keys in which the configs differ."""
    flat = [_flat(config) for config in configs]
    keys = sorted({key for config in flat for key in config})
    spelled_ = [(key, [repr(c[key]) if key in c else "" for c in flat]) for key in keys]
    return [(key, values) for key, values in spelled_ if len(set(values)) > 1]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of a config, by their path."""
    if not isinstance(value, Mapping):
        return {prefix: binding.to_lists(value)}
    flat: dict[str, Any] = {}
    for key, part in value.items():
        flat |= _flat(part, f"{prefix}.{key}" if prefix else str(key))
    return flat
