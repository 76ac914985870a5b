"""The search of `clipx.compare`: values drawn from the ranges of a config's `SEARCH`, for short
trials that are scored on rows held out of the training data."""

from __future__ import annotations

import copy
import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import numpy as np

from clipx.config import reading
from clipx.config.binding import bind
from clipx.config.files import override_all
from clipx.config.ranges import Share
from clipx.config.unknown import nearest
from clipx.errors import ConfigError, damaged_file
from clipx.planning.lengths import scaled
from clipx.training.metric_table import metric
from clipx.training.schema import EvalSpec
from clipx.training.workdir import write_json

FILE = "chosen.json"  # in the folder of a variant
_DIGITS = 3  # of a drawn number
_HELD_OUT = {"source": "auto", "path": ""}  # rows that the trial holds out of its training data


@dataclasses.dataclass(frozen=True)
class Search:
    """`SEARCH` of a config that `clipx.compare` reads.

    ranges: variant -> key of the config -> its range: `("log", 1e-4, 3e-3)`, `("uniform", 0, 0.2)`
    or `("choice", a, b, ...)`. In place of its ranges, a variant may name another, whose choice it
    takes. Variants without an entry are not searched.
    """

    ranges: dict[str, Any]
    metric: str = "retrieval/mean_recall"  # <eval>/<metric> of the config, that scores a trial
    share: Share = 1 / 3  # length of a trial, as a share of a final run's

    def source(self, variant: str) -> str | None:
        """The variant whose trials choose for `variant`; None without a search."""
        found = self.ranges.get(variant)
        if found is None:
            return None
        return found if isinstance(found, str) else variant

    def better(self, evals: Mapping[str, Any], score: float, other: float) -> bool:
        """Whether a score is better than another one."""
        less = metric(self.metric, evals).better == "less"
        return math.isfinite(score) and (score < other if less else score > other)


class Chosen(TypedDict):
    """The content of chosen.json."""

    trials: int  # among which it was chosen
    trial: int  # the best; 0 has the config's own values
    score: float
    changes: dict[str, Any]


def search(declared: Any, variants: Sequence[str]) -> Search:
    """The `SEARCH` of a config with these variants. Raises `ConfigError`."""
    bound = bind(Search, declared, where="SEARCH")
    for name, ranges in bound.ranges.items():
        where = f"SEARCH.ranges.{name}"
        if name not in variants:
            raise ConfigError(where, "no variant", ", ".join(variants), nearest(name, variants))
        if isinstance(ranges, str):
            if not isinstance(bound.ranges.get(ranges), dict):
                expected = "ranges, or the name of a variant that has ranges"
                raise ConfigError(where, repr(ranges), expected)
        elif not isinstance(ranges, dict) or not ranges:
            raise ConfigError(where, repr(ranges), "key of the config -> range")
        else:
            for key, range_ in ranges.items():
                _check_range(f"{where}.{key}", range_)
    return bound


def _check_range(where: str, range_: Any) -> None:
    kind, *rest = range_ if isinstance(range_, list | tuple) and range_ else [None]
    if kind == "choice" and rest:
        return
    numbers = [x for x in rest if isinstance(x, int | float) and not isinstance(x, bool)]
    if kind in ("log", "uniform") and len(rest) == len(numbers) == 2:
        low, high = numbers
        if math.isfinite(high) and low < high and (kind == "uniform" or low > 0):
            return
    expected = "('log', 1e-4, 3e-3), ('uniform', 0, 0.2) or ('choice', a, b, ...)"
    raise ConfigError(where, repr(range_), expected)


def draw(ranges: Mapping[str, Sequence[Any]], count: int) -> list[dict[str, Any]]:
    """The changes of `count` trials: the first has none, so that the search never chooses worse
    than the config by its own score. The others are a Halton sequence, shifted at random: they
    cover the ranges evenly, and more trials keep the earlier ones."""
    from scipy.stats import qmc  # more than a second, which other runs need not spend

    sequence = qmc.Halton(len(ranges), scramble=False).random(max(count - 1, 1))
    shift = np.random.default_rng(0).random(len(ranges))
    points = ((sequence + shift) % 1.0)[: count - 1]
    return [
        {},
        *({k: _value(r, u) for (k, r), u in zip(ranges.items(), row)} for row in points.tolist()),
    ]


def _value(range_: Sequence[Any], place: float) -> Any:
    """The value at a place from 0 to 1 in a range."""
    kind, *rest = range_
    if kind == "choice":
        return rest[int(place * len(rest))]
    low, high = rest
    value = low * (high / low) ** place if kind == "log" else low + place * (high - low)
    return float(f"{value:.{_DIGITS}g}")


def changed(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `config` with other values at some keys."""
    copied = copy.deepcopy(dict(config))
    override_all(copied, [(key, repr(value)) for key, value in changes.items()])
    return copied


def trial(config: Mapping[str, Any], changes: Mapping[str, Any], search: Search) -> dict[str, Any]:
    """The config of a trial of `config`, which is that of a final run: shorter, and with one eval,
    whose data are rows that it holds out of the training data. Raises `ConfigError` if the final
    run's evals read these rows too."""
    refuse_shared(config, search)
    name = search.metric.partition("/")[0]
    short = scaled(changed(config, changes), search.share)
    short["evals"] = {name: {**config["evals"][name], "data": dict(_HELD_OUT), "limit": None}}
    train = {"eval_every_steps": None, "save_every_steps": 1000, "best": "", "patience": None}
    short["train"] = {**short["train"], **train}
    return short


def refuse_shared(config: Mapping[str, Any], search: Search) -> None:
    """Raises `ConfigError` unless a search on rows of the training data leaves the rows of the
    config's evals unseen, and has an eval for its score."""
    evals = config.get("evals") or {}
    name = search.metric.partition("/")[0]
    spec = EvalSpec.check(name, evals[name]) if name in evals else None
    if spec is None or not spec.evaluator.pairs:
        pairs = [k for k, v in evals.items() if EvalSpec.check(k, v).evaluator.pairs]
        expected = f"a metric of an eval of pairs: {', '.join(pairs) or 'the config has none'}"
        raise ConfigError("SEARCH.metric", repr(search.metric), expected)
    for key, section in evals.items():
        where = f"config.evals.{key}.data"
        if EvalSpec.check(key, section).held_out:
            raise ConfigError(
                where,
                "no path: the final runs would be evaluated on the rows held out of the training "
                "data, on which the search chooses",
                "a test set that no trial reads",
                f"--{where}.path=..., or no --trials",
            )
        path = (section.get("data") or {}).get("path")
        if path and path == config["data"].get("path"):
            raise ConfigError(where, f"the training data, {path!r}", "a test set that no run reads")


def read_chosen(folder: pathlib.Path) -> Chosen | None:
    """What the search has chosen for the variant of a folder; None if there was none."""
    path = folder / FILE
    try:
        return reading.read_json(path, Chosen)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise damaged_file(path, error) from None


def write_chosen(folder: pathlib.Path, chosen: Chosen) -> None:
    write_json(folder / FILE, chosen)
