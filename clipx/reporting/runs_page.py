"""The page that compares runs: one table of their evals, what differs between their configs, their
curves over each other, and what the same queries find."""

from __future__ import annotations

import functools
import itertools
import math
import os
import pathlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from clipx.config import reading
from clipx.errors import CheckpointError, ConfigError, DataError, RunError, damaged_file
from clipx.evaluators.base import declared
from clipx.reporting import charts, claims, comparison, gallery, page
from clipx.reporting.charts import COLOURS, Figure, Line
from clipx.reporting.claims import Verdict
from clipx.reporting.gallery import Query, Samples
from clipx.reporting.templates import render, write_page
from clipx.reporting.trials_table import Trials
from clipx.training import episodes, metrics
from clipx.training.metric_table import TRAINING, metric, spelled
from clipx.training.run import restore
from clipx.training.workdir import read_json
from clipx.types import Metric

FILE = "comparison.html"
# what the curves may be drawn over: the name of an axis, and its value in a line of metrics
AXES: Mapping[str, str] = {
    "steps": "step",
    "examples": "examples",
    "seconds of training": "seconds",
}


class Compared(NamedTuple):
    """One of the runs that are compared."""

    name: str
    rows: Sequence[Mapping[str, Any]]  # of metrics.jsonl, with `seconds`
    config: Mapping[str, Any]
    samples: Samples | None = None
    group: str = ""  # of runs that differ in their seed alone; "": known by their configs alone

    @property
    def shown(self) -> str:
        """The name of its group, or its own."""
        return self.group or self.name

    @property
    def evals(self) -> Mapping[str, Any]:
        return self.config.get("evals") or {}

    @property
    def scores(self) -> Mapping[str, float]:
        """The metrics of its evals at the last step that has any, without those of detail."""
        found = comparison.results(self.rows, self.evals)
        return {key: x for key, x in found.items() if not metric(key, self.evals).detail}


class Cell(NamedTuple):
    """One metric of a run, or of several that differ in their seed alone."""

    text: str
    best: bool  # of its column


def read(workdir: str | os.PathLike, name: str = "") -> Compared:
    """A run, from the files of its workdir. name: default: the folder's. Raises `ConfigError` for a
    folder that is no workdir, and `RunError` for one without metrics."""
    folder = pathlib.Path(workdir).expanduser().absolute()
    path = folder / "config.json"
    try:
        config = reading.shaped(read_json(path), dict[str, Any])
    except ValueError as error:
        raise damaged_file(path, error) from None
    rows = metrics.read(folder)
    if not rows:
        raise RunError(f"no metrics in {folder / metrics.FILE}: nothing to compare")
    return Compared(name or folder.name, comparison.with_seconds(rows), config)


def write(
    path: str | os.PathLike,
    runs: Sequence[Compared],
    title: str = "Runs compared",
    verdicts: Sequence[Verdict] = (),
    searches: Sequence[Trials] = (),
) -> pathlib.Path:
    """Writes the page, and returns its path. verdicts: on claims about the runs. searches: the
    trials that chose their values. Raises `RunError` if it cannot be written."""
    runs = _distinct(runs)
    heads, table = _table(runs)
    firsts: dict[str, Compared] = {}  # of each group
    for run in runs:
        firsts.setdefault(run.shown, run)
    text = render(
        "runs.html",
        title=title,
        runs=list(zip(itertools.cycle(COLOURS), firsts)),
        heads=heads,
        table=table,
        verdicts=verdicts,
        rule=claims.RULE,
        searches=searches,
        differences=comparison.differences([run.config for run in firsts.values()]),
        axes=[(name, _curves(runs, name, key)) for name, key in AXES.items()],
        queries=_queries(runs),
    )
    file = pathlib.Path(path).expanduser().absolute()
    write_page(file, text)
    return file


def _distinct(runs: Sequence[Compared]) -> list[Compared]:
    """The runs, of which those of one name get a number."""
    names = [run.name for run in runs]
    seen: dict[str, int] = {}
    out = []
    for run in runs:
        if names.count(run.name) > 1:
            seen[run.name] = seen.get(run.name, 0) + 1
            run = run._replace(name=f"{run.name} ({seen[run.name]})")
        out.append(run)
    return out


def _table(
    runs: Sequence[Compared],
) -> tuple[list[str], list[tuple[str, Sequence[Cell | None]]]]:
    """(headings, (name, cells) of each row). Runs that differ in their seed alone share a row of
    means, with the least and the most."""
    groups: list[list[Compared]] = []
    for run in runs:
        same = (g for g in groups if _alike(g[0], run))
        group = next(same, None)
        groups.append([run]) if group is None else group.append(run)
    heads = list(dict.fromkeys(key for run in runs for key in run.scores))
    values = [
        {key: [run.scores[key] for run in group if key in run.scores] for key in heads}
        for group in groups
    ]
    kinds = {key: _kind(key, runs) for key in heads}
    best = {key: _best(kinds[key], [v[key] for v in values if v[key]]) for key in heads}
    rows = []
    for group, found in zip(groups, values):
        cells = [_cell(kinds[k], found[k], best[k]) if found[k] else None for k in heads]
        seeds = f" ({len(group)} seeds)" * (len(group) > 1)
        rows.append((", ".join(dict.fromkeys(run.shown for run in group)) + seeds, cells))
    return heads, rows


def _kind(key: str, runs: Sequence[Compared]) -> Metric:
    """What a metric means, by the first run that has it."""
    return next(metric(key, run.evals) for run in runs if key in run.scores)


def _alike(one: Compared, other: Compared) -> bool:
    """Whether two runs differ in their seed alone."""
    return one.group == other.group and _but_seed(one.config) == _but_seed(other.config)


def _but_seed(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return {key: value for key, value in config.items() if key != "seed"}


def _best(kind: Metric, columns: Sequence[Sequence[float]]) -> float | None:
    """The best mean; None for a metric of which neither direction is better, and for one row."""
    means = [m for m in map(statistics.fmean, columns) if math.isfinite(m)]
    if kind.better is None or len(columns) < 2 or not means:
        return None
    return (min if kind.better == "less" else max)(means)


def _cell(kind: Metric, values: Sequence[float], best: float | None) -> Cell:
    text = comparison.spread(values, functools.partial(spelled, kind))
    return Cell(text, statistics.fmean(values) == best)


def _curves(runs: Sequence[Compared], axis: str, key: str) -> list[Figure]:
    """The charts over one axis: the loss, the training metrics with a curve, and all metrics of
    evals that have two values in a run."""
    points = [_points(run.rows, key) for run in runs]
    colours = dict(zip(dict.fromkeys(run.shown for run in runs), itertools.cycle(COLOURS)))
    names = list(dict.fromkeys(name for of_run in points for name in of_run))
    trained = {name: pattern for name in names if (pattern := declared(TRAINING, name))}
    order = [name for pattern in TRAINING for name in names if trained.get(name) == pattern]
    figures = []
    for name in [*order, *(name for name in names if name not in trained)]:
        known = TRAINING[trained[name]] if name in trained else _of_evals(name, runs)
        if known is None or (name in trained and (known.curve is None or known.curve.level)):
            continue
        drawn = [of_run.get(name, []) for of_run in points]
        if max(map(len, drawn)) < 2:
            continue
        title = name
        if known.shown == "percent":
            title, drawn = f"{name}, %", [charts.percent(line) for line in drawn]
        smooth = known.curve is None or known.curve.smooth
        lines = [
            Line(run.shown, line, smooth, colour=colours[run.shown])
            for run, line in zip(runs, drawn)
            if line
        ]
        from_zero = known.curve is None or known.curve.from_zero
        salt = f"{axis} {name}"
        figures.append(charts.chart(title, lines, from_zero=from_zero, x=axis, salt=salt))
    return figures


def _of_evals(name: str, runs: Sequence[Compared]) -> Metric | None:
    """What a metric of an eval means; None for one of detail, and for any other metric."""
    for run in runs:
        if name.partition("/")[0] in run.evals:
            known = metric(name, run.evals)
            return None if known.detail else known
    return None


def _points(rows: Sequence[Mapping[str, Any]], key: str) -> dict[str, list[tuple[float, float]]]:
    """Metric -> its (place on the axis, value) pairs."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name not in ("step", "examples", "epoch", "seconds") and key in row:
                found.setdefault(name, []).append((row[key], value))
    return found


def _queries(runs: Sequence[Compared]) -> list[tuple[str, list[tuple[str, Query, list[str]]]]]:
    """(caption, (run, what it found, the pictures) of each) of the captions that all runs with
    pictures have; [] for fewer than two such runs."""
    seen = [(run, run.samples) for run in runs if run.samples is not None]
    found = [{query.caption: query for query in gallery.queries(samples)} for _, samples in seen]
    if len(seen) < 2:
        return []
    shared = [caption for caption in found[0] if all(caption in of_run for of_run in found)]
    shown = []
    for caption in shared:
        columns = []
        for (run, samples), of_run in zip(seen, found):
            query = of_run[caption]
            uris = [episodes.thumbnail(samples.pictures[hit.picture]) for hit in query.hits]
            columns.append((run.shown, query, uris))
        shown.append((caption, columns))
    return shown


def compare(
    workdirs: Sequence[str],
    out: str,
    say: Callable[[str], Any],
    names: Sequence[str] = (),
    groups: Sequence[str] = (),
    verdicts: Sequence[Verdict] = (),
    searches: Sequence[Trials] = (),
) -> str:
    """Writes the page that compares the runs of some workdirs, and returns its path; "" in the
    other processes of a run. What the models find is shown where they can be opened; `say` gets a
    line about each that cannot. names: of the runs; default: their folders'. groups: of runs that
    differ in their seed alone, of which only the first is opened. The rest as for `write`."""
    shown = list(names) or _names(workdirs)
    compared: list[Compared] = []
    for i, (folder, name) in enumerate(zip(workdirs, shown, strict=True)):
        group = groups[i] if groups else ""
        again = group and group in groups[:i]
        run = read(folder, name) if again else _looked(folder, name, say)
        compared.append(run._replace(group=group))
    if jax.process_index() != 0:
        return ""
    return str(write(out, compared, verdicts=verdicts, searches=searches))


def _names(workdirs: Sequence[str]) -> list[str]:
    """The workdirs' paths below the folder that has them all."""
    paths = [os.path.abspath(os.path.expanduser(folder)) for folder in workdirs]
    shared = os.path.commonpath(paths)
    return [os.path.relpath(p, shared) if p != shared else os.path.basename(p) for p in paths]


def _looked(workdir: str, name: str, say: Callable[[str], Any]) -> Compared:
    """A run, with what its model finds among the pictures of its first eval that has captions. A
    model or data that is gone is said."""
    run = read(workdir, name)
    try:
        opened, state = restore(workdir)
        pairs = opened.samples()
        samples = None if pairs is None else page.look(opened.encode(state), pairs)
    except (ConfigError, DataError, RunError, CheckpointError) as error:
        first = str(error).splitlines()
        say(f"{run.name}: no pictures, as the run cannot be opened: {' '.join(first[:2])}")
        return run
    return run._replace(samples=samples)
