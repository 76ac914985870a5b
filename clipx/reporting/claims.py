"""Whether claims hold: each compares one metric of two variants over the same seeds."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import scipy.special

from clipx.config.binding import bind
from clipx.errors import ConfigError
from clipx.reporting.comparison import Result, spread
from clipx.training.metric_table import metric

HOLDS, OPPOSITE, UNKNOWN = "holds", "does not hold at this scale", "cannot be told"
_SEEDS = 3  # the least that tell anything
RULE = (
    "A claim holds if the 95 % interval of the difference, paired by seed (Student's t), is above "
    f"zero, and does not hold at this scale if it is below; at least {_SEEDS} seeds."
)

Scores = Mapping[str, Mapping[int, Mapping[str, float]]]  # variant -> seed -> metric -> value


@dataclasses.dataclass(frozen=True)
class Claim:
    """An entry of `CLAIMS` of a config that `clipx.compare` reads: that the variant `better` is
    better than `worse` by a metric, `<eval>/<metric>`."""

    claim: str
    source: str  # where the paper says it
    metric: str
    better: str
    worse: str
    would_tell: str = ""  # the experiment that would tell, where this one cannot


class Verdict(NamedTuple):
    """A claim with what the runs say, formatted."""

    claim: Claim
    better: str
    worse: str
    difference: str  # with its interval
    seeds: int
    verdict: str
    why: str

    @property
    def undecided(self) -> bool:
        return self.verdict == UNKNOWN


def claims(declared: Any, variants: Sequence[str]) -> list[Claim]:
    """The `CLAIMS` of a config with these variants. Raises `ConfigError`."""
    bound = [bind(Claim, one, where=f"CLAIMS[{i}]") for i, one in enumerate(declared or ())]
    for i, claim in enumerate(bound):
        for key, name in (("better", claim.better), ("worse", claim.worse)):
            if name not in variants:
                raise ConfigError(f"CLAIMS[{i}].{key}", repr(name), ", ".join(variants))
    return bound


def verdicts(claims: Sequence[Claim], runs: Mapping[str, Sequence[Result]]) -> list[Verdict]:
    """What runs say about some claims. runs: of each variant."""
    scores = {name: {run.seed: run.scores for run in of} for name, of in runs.items()}
    evals = {name: spec for of in runs.values() for run in of for name, spec in run.evals.items()}
    return [judged(claim, scores, evals) for claim in claims]


def judged(claim: Claim, scores: Scores, evals: Mapping[str, Any]) -> Verdict:
    """What the runs say about a claim. evals: the section of a config, which names the evaluator of
    the metric."""
    kind, key = metric(claim.metric, evals), claim.metric
    better, worse = (
        {seed: of[key] for seed, of in scores.get(name, {}).items() if key in of}
        for name in (claim.better, claim.worse)
    )
    seeds = sorted(better.keys() & worse.keys())
    pairs = [(better[seed], worse[seed]) for seed in seeds]
    sign = -1 if kind.better == "less" else 1
    differences = [sign * (x - y) for x, y in pairs]
    unit = 100 if kind.shown == "percent" else 1
    digits = 1 if unit == 100 else 3

    def spell(value: float, plus: str = "") -> str:
        return f"{unit * value:{plus}.{digits}f}"

    if not seeds:
        return Verdict(claim, "", "", "", 0, UNKNOWN, "no seed has both numbers")
    first, second = (spread(list(values), spell) for values in zip(*pairs))
    mean = statistics.fmean(differences)
    if len(seeds) < _SEEDS:
        why = "one seed" if len(seeds) == 1 else f"{len(seeds)} seeds"
        return Verdict(claim, first, second, spell(mean, "+"), len(seeds), UNKNOWN, why)
    half = half_width(differences)
    shown = f"{spell(mean, '+')} ({spell(mean - half, '+')} to {spell(mean + half, '+')})"
    told = HOLDS if mean - half > 0 else OPPOSITE if mean + half < 0 else UNKNOWN
    why = "the interval includes zero" if told == UNKNOWN else ""
    return Verdict(claim, first, second, shown, len(seeds), told, why)


def half_width(differences: Sequence[float]) -> float:
    """Half of the 95 % interval of the mean of normal differences (Student's t)."""
    count = len(differences)
    quantile = float(scipy.special.stdtrit(count - 1, 0.975))
    return quantile * statistics.stdev(differences) / math.sqrt(count)


def table(verdicts: Sequence[Verdict]) -> list[str]:
    """An empty line, the lines of a Markdown table, and the rule below it; [] without claims."""
    if not verdicts:
        return []
    lines = [
        "",
        "| claim | source | metric | better | worse | difference | seeds | verdict |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in verdicts:
        claim, told = one.claim, f"{one.verdict}: {one.why}" if one.why else one.verdict
        if one.undecided and claim.would_tell:
            told += f". Would tell: {claim.would_tell}"
        better, worse = f"{claim.better} {one.better}", f"{claim.worse} {one.worse}"
        cells = [claim.claim, claim.source, claim.metric, better, worse, one.difference]
        lines.append("| " + " | ".join([*cells, str(one.seeds), told]) + " |")
    return [*lines, "", RULE]
