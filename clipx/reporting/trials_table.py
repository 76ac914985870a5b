"""The trials of a search, as the page that compares runs shows them."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

from clipx.reporting import comparison
from clipx.training import compared, metrics
from clipx.training.metric_table import metric, spelled


class Trial(NamedTuple):
    """A trial, formatted."""

    number: int
    values: list[str]  # of `Trials.keys`; "" for the config's own value
    score: str
    chosen: bool


class Trials(NamedTuple):
    """The trials of a variant."""

    variant: str
    metric: str  # that scores them
    keys: list[str]  # of the config, whose values were tried
    rows: list[Trial]


def read(variant: str, folders: Sequence[pathlib.Path], chosen: int) -> Trials:
    """The trials in some workdirs, which have their numbers as names. chosen: that of the best. A
    trial that could not be trained has the reason in place of its score; one that was deleted is
    left out."""
    folders = [folder for folder in folders if (folder / "config.json").exists()]
    known = [compared.read(folder) for folder in folders]
    keys = list(dict.fromkeys(key for one in known for key in one.get("changes", {})))
    name = next(filter(None, (one.get("metric", "") for one in known)), "")
    rows = []
    for folder, one in zip(folders, known):
        number, changes = int(folder.name), one.get("changes", {})
        values = [str(changes[key]) if key in changes else "" for key in keys]
        score = one.get("failed") or _score(folder, name)
        rows.append(Trial(number, values, score, number == chosen))
    return Trials(variant, name, keys, rows)


def _score(folder: pathlib.Path, name: str) -> str:
    evals = comparison.evals_of(folder)
    found = comparison.results(metrics.read(folder), evals)
    return spelled(metric(name, evals), found[name]) if name in found else ""
