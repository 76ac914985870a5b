"""Warns of a run that learns nothing: a tower whose outputs are all the same, a loss that stays at
chance, a logit scale that stays at its clamp."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax

from clipx.parallel.mesh import path_name
from clipx.training.parameter_rules import claim, frozen
from clipx.training.run import OpenRun
from clipx.training.schedule import warmup_steps

_COLLAPSED = 0.01  # a tower's variance below which its rows count as one point
_AT_CHANCE = 0.99  # share of the loss at chance
_SPAN = 100  # steps over which a metric is averaged


class Cause(NamedTuple):
    """Something that is wrong at present. A higher level is worse."""

    level: int
    text: str


@dataclasses.dataclass
class Watch:
    """Looks at the metrics of logged steps, once the warm-up is over.

    A cause must show in the mean of all lines of `span` steps. What small runs show in their first
    steps, before anything is learned, is none.
    """

    start: int  # the step from which on lines count: the end of the warm-up
    span: int  # steps
    chance: Mapping[str, float]  # as `Objective.chance` returns it
    bounds: tuple[float, ...]  # values of a logit scale at a clamp
    learning_rate: float  # the config's
    _lines: collections.deque[tuple[int, Mapping[str, float]]] = dataclasses.field(
        default_factory=collections.deque
    )
    _causes: dict[str, Cause] = dataclasses.field(default_factory=dict)  # that hold at present

    @classmethod
    def of(cls, run: OpenRun) -> Watch:
        """The watch of a run."""
        config = run.config.optimizer
        warm = warmup_steps(config, batch_size=run.batch_size, rows=run.rows) or 0
        bounds = {
            math.exp(bound)
            for (path, still), rule in zip(
                jax.tree.leaves_with_path(frozen(config.freeze, run.state.params)),
                jax.tree.leaves(claim(config.rules, run.state.params)),
                strict=True,
            )
            if path_name(path).endswith("logit_scale") and not still
            for bound in config.rules[rule].clamp or ()
        }
        return cls(
            start=warm,
            span=max(_SPAN, 5 * run.config.train.log_every_steps),
            chance=run.objective.chance(run.batch_size),
            bounds=tuple(bounds),
            learning_rate=config.learning_rate,
        )

    @property
    def holding(self) -> int:
        """How many causes hold at present."""
        return len(self._causes)

    def look(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        """Lines to print about the metrics of `step`: one for each cause that has begun, has become
        worse, or has gone."""
        if step <= self.start or metrics.get("skipped"):
            return []
        self._lines.append((step, metrics))
        while self._lines[0][0] <= step - self.span:
            self._lines.popleft()
        if step < self.start + self.span:
            return []
        mean = {
            name: sum(float(line[name]) for _, line in self._lines) / len(self._lines)
            for name in metrics
            if all(name in line for _, line in self._lines)
        }
        before, self._causes = self._causes, dict(self._find(mean))
        said = [
            f"warning at step {step:,}: {cause.text}"
            for name, cause in self._causes.items()
            if name not in before or cause.level > before[name].level
        ]
        for name, cause in before.items():  # a cause that gets better and worse again is said once
            if name in self._causes and cause.level > self._causes[name].level:
                self._causes[name] = self._causes[name]._replace(level=cause.level)
        gone = [name for name in before if name not in self._causes]
        return said + [f"step {step:,}: no longer: {name}" for name in gone]

    def _find(self, mean: Mapping[str, float]) -> Iterator[tuple[str, Cause]]:
        """(name, cause) of all that is wrong with the means of metrics over `span` steps."""
        for tower in ("image", "text"):
            yield from self._collapse(tower, mean.get(f"batch/{tower}_variance", math.nan))
        for name, chance in (self.chance or {"loss": mean.get("chance_loss", math.nan)}).items():
            yield from self._at_chance(name, mean.get(name, math.nan), chance)
        for name, scale in mean.items():
            if name.startswith("logit_scale"):
                yield from self._at_bound(name, scale)

    def _collapse(self, tower: str, variance: float) -> Iterator[tuple[str, Cause]]:
        name = f"the {tower} tower has collapsed"
        limit = _COLLAPSED * (1 + (name in self._causes))  # leaves no doubt when it has gone
        if variance < limit:
            what = "pictures" if tower == "image" else "captions"
            yield (
                name,
                Cause(
                    max(0, math.ceil(-math.log10(max(variance, 1e-9) / _COLLAPSED))),
                    f"{name}: its outputs for different {what} are nearly the same "
                    f"(batch/{tower}_variance {variance:.2g}, where 0 is one point). Likely the "
                    "learning rate is too high or the warm-up too short, or the data's "
                    f"{what} are all alike; try config.optimizer.learning_rate="
                    f"{self.learning_rate / 5:.1g}",
                ),
            )

    def _at_chance(self, metric: str, value: float, chance: float) -> Iterator[tuple[str, Cause]]:
        name = f"{metric} is at chance"
        if chance > 0 and value >= chance * (_AT_CHANCE - 0.02 * (name in self._causes)):
            text = (
                f"{name} after the warm-up ({value:.4g}; equal outputs give {chance:.4g}): no "
                "pair is told from another. Likely captions do not belong to their pictures "
                "(look: python -m clipx.dataset preview), or the learning rate "
                f"({self.learning_rate:g}) does not suit: try a fifth, and three times as much"
            )
            yield name, Cause(int(value > 1.5 * chance), text)

    def _at_bound(self, metric: str, scale: float) -> Iterator[tuple[str, Cause]]:
        name = f"{metric} is at its clamp"
        for bound in self.bounds:
            if math.isclose(scale, bound, rel_tol=1e-4):
                why = (
                    "Late in a long run that is usual. Early, pairs are told apart too easily: "
                    "likely few or repeated pairs are learned by heart, or the batch is small; try "
                    "more data, a larger batch or config.optimizer.weight_decay"
                )
                if bound <= 1:
                    why = (
                        "Likely pairs cannot be told apart: captions do not belong to their "
                        "pictures, or the learning rate is too high"
                    )
                yield name, Cause(0, f"{name} ({bound:g}). {why}")
