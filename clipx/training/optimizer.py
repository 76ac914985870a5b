"""Optimizer chains and schedules, all from optax."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from clipx.config.binding import duration
from clipx.errors import ConfigError
from clipx.training.parameter_rules import DEFAULT_RULES, WHERE, Rule, claim, frozen, layer_factors
from clipx.types import PyTree


@dataclasses.dataclass(frozen=True)
class LookaheadConfig:
    """Slow weights that follow the fast ones (Zhang et al. 2019, arXiv 1907.08610)."""

    k: int = 5  # updates between two meetings
    alpha: float = 0.5  # how far the slow weights go; the fast ones go on from there

    def __post_init__(self):
        if self.k < 1:
            raise ConfigError("LookaheadConfig.k", str(self.k), "1 or more")
        if not 0 < self.alpha <= 1:
            raise ConfigError("LookaheadConfig.alpha", str(self.alpha), "a number in (0, 1]")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    name: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = 5e-4  # at the end of the warm-up
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    final_learning_rate: float = 0.0  # at the run's last step
    warmup_from: float = 0.0  # the learning rate that a warm-up starts from
    warmup_steps: int | None = None
    warmup_epochs: float | None = None
    warmup_examples: int | None = None
    hold_steps: int = 0  # updates more at the peak, before the decay
    weight_decay: float = 0.2
    # decoupled: times the learning rate, beside the gradient; coupled: L2, added to the clipped
    # gradient, so that the moments see it
    decay: Literal["decoupled", "coupled"] = "decoupled"
    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-6
    mu_dtype: Literal["float32", "bfloat16"] = "float32"  # of Adam's first moment or SGD's trace
    momentum: float = 0.9  # SGD's
    nesterov: bool = False
    clip_norm: float | None = None  # of the whole gradient
    lookahead: LookaheadConfig | None = None
    # by regexes searched in a parameter's path: what stays as it starts, without moments. A tower
    # that is named whole, ("^image/",) for one, runs as in evaluation, without a backward pass.
    freeze: tuple[str, ...] = ()
    # times the learning rate for each block below a tower's top, its embeddings the lowest (Bao et
    # al. 2022, arXiv 2106.08254): what fine-tuning does
    layer_decay: float = 1.0
    rules: tuple[Rule, ...] = DEFAULT_RULES  # the first that matches claims a parameter

    def __post_init__(self):
        for field in ("learning_rate", "final_learning_rate", "warmup_from", "weight_decay"):
            self._check(field, getattr(self, field) >= 0, "0 or more")
        for field in ("b1", "b2", "momentum"):
            self._check(field, 0 <= getattr(self, field) < 1, "a number in [0, 1)")
        self._check("eps", self.eps > 0, "more than 0")
        self._check("clip_norm", self.clip_norm is None or self.clip_norm > 0, "more than 0")
        self._check("hold_steps", self.hold_steps >= 0, "0 or more")
        self._check("layer_decay", 0 < self.layer_decay <= 1, "a number in (0, 1]")
        for i, rule in enumerate(self.rules):
            if rule.horizon < 1 and self.schedule == "constant":
                where = f"OptimizerConfig.rules[{i}].horizon"
                found = f"{rule.horizon} with a constant schedule, which does not decay"
                raise ConfigError(where, found, "1.0", "schedule='cosine'; or learning_rate=0.0")

    def _check(self, field: str, ok: bool, expected: str) -> None:
        if not ok:
            found = str(getattr(self, field))
            raise ConfigError(f"OptimizerConfig.{field}", found, expected)


def make_schedule(
    config: OptimizerConfig, *, steps: int | None, batch_size: int, rows: int | None
) -> Callable[..., jax.Array]:
    """Learning rate by update: linear warm-up, peak, then the named decay to the last step.

    `schedule(count)` is the run's own; `schedule(count, horizon=share)`, for the horizon of one of
    the rules, differs in that its decay is over after that share of the steps.

    With `steps` None (a length in epochs, data not open yet) the schedule is constant: such a run
    can be traced and planned, and is assembled anew before it trains.
    """
    warmup = duration(dataclasses.asdict(config), "warmup", where=WHERE, optional=True)
    warm = warmup.steps(batch_size=batch_size, rows=rows) if warmup else 0
    if steps is None or warm is None:
        constant = optax.constant_schedule(config.learning_rate)
        return lambda count, horizon=1.0: constant(count)
    start = warm + config.hold_steps
    if start > steps:
        where = warmup.where if warm > steps else f"{WHERE}.hold_steps"
        in_steps = warm > steps and warmup.unit == "steps"
        raise ConfigError(
            where,
            f"a warm-up of {warm} steps" + f" and {config.hold_steps} more" * (warm <= steps),
            f"at most the run's {steps} steps",
            f"{where}={steps // 10}" if in_steps else "a shorter one",
        )
    ends = {1.0: steps}
    for i, rule in enumerate(config.rules):
        ends[rule.horizon] = round(rule.horizon * steps)
        if start > ends[rule.horizon]:
            raise ConfigError(
                f"{WHERE}.rules[{i}].horizon",
                f"{rule.horizon}, which is step {ends[rule.horizon]}",
                f"at least step {start}, where the decay begins",
            )
    schedules = {share: _schedule(config, warm, end) for share, end in ends.items()}
    return lambda count, horizon=1.0: schedules[horizon](count)


def _schedule(config: OptimizerConfig, warm: int, end: int) -> optax.Schedule:
    """The schedule whose warm-up takes `warm` updates and whose decay is over at `end`."""
    peak, final, start = config.learning_rate, config.final_learning_rate, warm + config.hold_steps
    rest = max(end - start, 1)
    decay = {
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, final / peak if peak else 0.0),
        "linear": lambda: optax.linear_schedule(peak, final, rest),
        "constant": lambda: optax.constant_schedule(peak),
    }[config.schedule]()
    parts, bounds = [], []
    if warm:
        parts, bounds = [optax.linear_schedule(config.warmup_from, peak, warm)], [warm]
    if config.hold_steps:
        parts, bounds = [*parts, optax.constant_schedule(peak)], [*bounds, start]
    return optax.join_schedules([*parts, decay], bounds) if parts else decay


def _clamp(rules, claims) -> optax.GradientTransformation:
    """Shortens updates so that clamped parameters end within their bounds."""

    def update(updates, state, params):
        def leaf(u, p, i):
            if rules[i].clamp is None:
                return u
            return jnp.clip(p + u, *rules[i].clamp) - p

        return jax.tree.map(leaf, updates, params, claims), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _descend(schedule: Callable, horizons: PyTree) -> optax.GradientTransformation:
    """`optax.scale_by_learning_rate`, and its state, with a horizon for each parameter."""

    def init(params):
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

    def update(updates, state, params=None):
        rates = {
            share: schedule(state.count) if share == 1 else schedule(state.count, horizon=share)
            for share in sorted(set(jax.tree.leaves(horizons)))
        }
        updates = jax.tree.map(lambda u, h: jnp.asarray(-rates[h], u.dtype) * u, updates, horizons)
        return updates, optax.ScaleByScheduleState(optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)


class LookaheadState(NamedTuple):
    count: jax.Array  # updates since the start
    slow: PyTree  # a second copy of the parameters


def _lookahead(config: LookaheadConfig) -> optax.GradientTransformation:
    """Makes every k-th update end between the slow weights and the fast ones, and the slow weights
    move there too. `optax.lookahead` would have the parameters in pairs; its moments, like these,
    stay as they are."""

    def init(params):
        return LookaheadState(jnp.int32(0), jax.tree.map(jnp.copy, params))

    def update(updates, state, params):
        count = state.count + 1
        meet = count % config.k == 0

        def between(u, p, slow):
            return jnp.where(meet, slow + config.alpha * (p + u - slow) - p, u)

        updates = jax.tree.map(between, updates, params, state.slow)
        slow = jax.tree.map(
            lambda p, slow: jnp.where(meet, p, slow),
            optax.apply_updates(params, updates),
            state.slow,
        )
        return updates, LookaheadState(count, slow)

    return optax.GradientTransformation(init, update)


def make_optimizer(
    config: OptimizerConfig, schedule: Callable, params: PyTree
) -> optax.GradientTransformation:
    """The whole chain for parameters of these paths (abstract ones will do): clip, coupled weight
    decay, moments, decoupled weight decay, learning rate, clamp, lookahead; around what is frozen.

    `schedule` is that of `make_schedule`, or any of the count alone where no rule has a horizon."""
    still = frozen(config.freeze, params)

    def moving(tree):
        return jax.tree.map(lambda s, x: optax.MaskedNode() if s else x, still, tree)

    claims = moving(claim(config.rules, params))

    def times(field):
        return jax.tree.map(lambda i: getattr(config.rules[i], field), claims)

    def scaled(factors):
        return optax.stateless(
            lambda updates, _: jax.tree.map(
                lambda u, f: u if np.all(f == 1.0) else u * jnp.asarray(f, u.dtype),
                updates,
                factors,
            )
        )

    rates = times("learning_rate")
    if config.layer_decay < 1:
        layers = moving(layer_factors(config.layer_decay, params))
        rates = jax.tree.map(lambda rate, factor: rate * factor, rates, layers)
    factors = times("weight_decay")
    decay = optax.stateless(
        lambda updates, params: jax.tree.map(
            lambda u, p, f: u + jnp.asarray(config.weight_decay * f, u.dtype) * p if f else u,
            updates,
            params,
            factors,
        )
    )
    mu_dtype = None if config.mu_dtype == "float32" else config.mu_dtype  # None: the parameters'
    if config.name == "adamw":
        moments = optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=mu_dtype)
    else:
        moments = optax.trace(config.momentum, config.nesterov, mu_dtype)
    chain = []
    if config.clip_norm is not None:
        chain.append(optax.clip_by_global_norm(config.clip_norm))
    chain += [decay, moments] if config.decay == "coupled" else [moments, decay]
    chain += [scaled(rates), _descend(schedule, times("horizon"))]
    chain.append(_clamp(config.rules, claims))
    if config.lookahead is not None:
        chain.append(_lookahead(config.lookahead))
    if not config.freeze:
        return optax.chain(*chain)
    labels = jax.tree.map(lambda s: "still" if s else "moving", still)
    return optax.partition({"still": optax.set_to_zero(), "moving": optax.chain(*chain)}, labels)


def updates_done(opt_state: PyTree) -> jax.Array | None:
    """How many updates the schedule has seen, which is steps less those skipped; None for an
    optimizer without a schedule."""

    def scheduled(node):
        return isinstance(node, optax.ScaleByScheduleState)

    found = [s for s in jax.tree.leaves(opt_state, is_leaf=scheduled) if scheduled(s)]
    return found[0].count if found else None
