"""Learning-rate schedules, from those of optax."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from clipx.config.durations import Duration, duration
from clipx.errors import ConfigError
from clipx.training.optimizer import OptimizerConfig
from clipx.training.parameter_rules import WHERE


def _warmup(config: OptimizerConfig) -> Duration | None:
    return duration(dataclasses.asdict(config), "warmup", where=WHERE, optional=True)


def warmup_steps(config: OptimizerConfig, *, batch_size: int, rows: int | None) -> int | None:
    """Steps of the warm-up, 0 without one; None for a length in epochs if `rows` is None."""
    warmup = _warmup(config)
    return warmup.steps(batch_size=batch_size, rows=rows) if warmup else 0


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A function from the count of updates to the learning rate: linear warm-up, hold, decay.

    `schedule(count)` decays until the run's last step, `schedule(count, horizon=share)` until that
    share of the steps. `share` is the horizon of one of the rules. A program takes `lengths` as an
    argument, and so is the same for runs of any length.
    """

    config: OptimizerConfig
    warm: int  # updates of the warm-up
    ends: Mapping[float, int]  # horizon -> update at which the decay ends; {}: always the peak
    begin: int = 0  # the update from which all of these count, of a run that was extended there

    @property
    def lengths(self) -> np.ndarray:
        """What depends on the length of the run, int32 [2 + horizons]: `begin`, `warm`, `ends`."""
        return np.array([self.begin, self.warm, *self.ends.values()], np.int32)

    def __call__(
        self, count: Any, horizon: float = 1.0, lengths: jax.Array | np.ndarray | None = None
    ) -> jax.Array:
        """The learning rate of the update after `count` others. lengths: of a run, in place of this
        schedule's own."""
        config, peak = self.config, self.config.learning_rate
        if not self.ends:
            return jnp.asarray(peak)
        known = self.lengths if lengths is None else lengths
        warm, end = known[1], known[2 + list(self.ends).index(horizon)]
        count, start = jnp.maximum(count - known[0], 0), warm + config.hold_steps
        # of optax's schedules the unit of time is their length here, which need not be a constant
        decay = {
            "cosine": optax.cosine_decay_schedule(
                peak, 1, config.final_learning_rate / peak if peak else 0.0
            ),
            "linear": optax.linear_schedule(peak, config.final_learning_rate, 1),
            "constant": optax.constant_schedule(peak),
        }[config.schedule]
        rise = optax.linear_schedule(config.warmup_from, peak, 1)
        rate = decay(jnp.maximum(count - start, 0) / jnp.maximum(end - start, 1))
        rate = jnp.where(count < start, peak, rate)
        return jnp.where(count < warm, rise(count / jnp.maximum(warm, 1)), rate)


def make_schedule(
    config: OptimizerConfig,
    *,
    steps: int | None,
    batch_size: int,
    rows: int | None,
    start: int = 0,
) -> Schedule:
    """The learning rate as a function of the count of updates.

    steps: of the run; None (a length in epochs, whose data is not open yet) gives a constant
    schedule, with which a run can be traced and planned but not trained. rows: of training data,
    for a warm-up in epochs. start: the step at which the schedule begins, of a run that was
    extended there. Raises `ConfigError` for a warm-up longer than the run or a horizon.
    """
    if start and steps is not None:
        if steps <= start:
            found = f"a run of {steps:,} steps, which is at step {start:,} already"
            raise ConfigError(
                "--extend", found, "a longer run", "a larger config.train.total_steps"
            )
        later = make_schedule(config, steps=steps - start, batch_size=batch_size, rows=rows)
        return dataclasses.replace(later, begin=start)
    warmup = _warmup(config)
    warm = warmup_steps(config, batch_size=batch_size, rows=rows)
    if steps is None or warm is None:
        return Schedule(config, 0, {})
    start = warm + config.hold_steps
    if start > steps:
        too_long = warmup if warm > steps else None
        where = too_long.where if too_long else f"{WHERE}.hold_steps"
        hold = "" if too_long else f" and {config.hold_steps} more at the peak"
        most, tenth = str(steps - warm), ""
        if too_long:
            sizes = {"batch_size": batch_size, "rows": rows}
            most, tenth = (too_long.spelled(n, **sizes) for n in (steps, steps // 10))
        raise ConfigError(
            where,
            f"a warm-up of {warm} steps{hold}",
            f"at most the run's {steps} steps, which is {where.rpartition('.')[2]}={most}",
            f"{where}={tenth or most}",
        )
    ends = {1.0: steps}
    for i, rule in enumerate(config.rules):
        ends[rule.horizon] = round(rule.horizon * steps)
        if start > ends[rule.horizon]:
            least = math.ceil(1e4 * start / steps) / 1e4
            raise ConfigError(
                f"{WHERE}.rules[{i}].horizon",
                f"{rule.horizon}, which is step {ends[rule.horizon]}",
                f"a share of at least {least:g}: the decay begins at step {start}",
            )
    return Schedule(config, warm, ends)
