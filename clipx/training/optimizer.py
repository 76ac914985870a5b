"""Optimizer chains and schedules, all from optax."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from clipx.config.ranges import (
    Count,
    CountOrZero,
    LearningRate,
    LongCount,
    NonNegative,
    Positive,
    Rate,
    Share,
)
from clipx.errors import ConfigError
from clipx.training import average
from clipx.training.parameter_rules import DEFAULT_RULES, Rule, claim, frozen, layer_factors
from clipx.types import PyTree


@dataclasses.dataclass(frozen=True)
class LookaheadConfig:
    """Lookahead (Zhang et al. 2019, arXiv 1907.08610): every `k` updates the slow weights move by
    `alpha` towards the fast ones, which continue from there."""

    k: Count = 5
    alpha: Share = 0.5


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """`config.optimizer`."""

    name: Literal["adamw", "sgd"] = "adamw"  # the optimizer
    learning_rate: LearningRate = 5e-4  # at the end of the warm-up
    schedule: Literal["cosine", "linear", "constant"] = "cosine"  # after warm-up and hold
    final_learning_rate: LearningRate = 0.0  # at the run's last step
    warmup_from: LearningRate = 0.0  # the learning rate that a warm-up starts from
    warmup_steps: CountOrZero | None = None  # the length of the linear warm-up in steps
    warmup_epochs: NonNegative | None = None  # the same in passes over the data
    warmup_examples: LongCount | None = None  # the same in pairs seen
    hold_steps: CountOrZero = 0  # updates at the peak, between the warm-up and the decay
    weight_decay: NonNegative = 0.2  # of the parameters whose rule decays them
    # decoupled: subtracted from the parameter, times the learning rate; coupled: L2, added to the
    # clipped gradient, so that it enters the moments
    decay: Literal["decoupled", "coupled"] = "decoupled"
    b1: Rate = 0.9  # decay of Adam's first moment
    b2: Rate = 0.98  # decay of Adam's second moment
    eps: Positive = 1e-6  # added to the root of Adam's second moment
    mu_dtype: Literal["float32", "bfloat16"] = "float32"  # of Adam's first moment or SGD's trace
    momentum: Rate = 0.9  # of SGD
    nesterov: bool = False  # of SGD
    clip_norm: Positive | None = None  # the largest global norm of the gradient
    lookahead: LookaheadConfig | None = None  # slow weights beside the fast ones; None: none
    # regexes searched in a parameter's path: matching parameters never change and have no moments.
    # A tower that is frozen completely, as by ("^image/",), runs in evaluation mode without a
    # backward pass.
    freeze: tuple[str, ...] = ()
    # layer-wise learning rate decay for fine-tuning (Bao et al. 2022, arXiv 2106.08254): the factor
    # of the learning rate from one block of a tower to the block below; embeddings are the lowest
    layer_decay: Share = 1.0
    # decay of an average of the parameters that is kept beside them, evaluated and exported on
    # request; 0: none
    average: Rate = 0.0
    rules: tuple[Rule, ...] = DEFAULT_RULES  # each parameter follows the first rule that matches it

    def __post_init__(self):
        for i, rule in enumerate(self.rules):
            if rule.horizon < 1 and self.schedule == "constant":
                where = f"OptimizerConfig.rules[{i}].horizon"
                raise ConfigError(
                    where,
                    f"{rule.horizon} with a constant schedule, which does not decay",
                    "1.0",
                    "schedule='cosine' or 'linear'; or learning_rate=0.0 in the rule",
                )


def norm(tree: PyTree) -> jax.Array:
    """The Euclidean norm of all arrays of a tree, in their dtype. `optax.tree.norm` also squares
    the imaginary parts, which takes longer to trace than a tower."""
    squares = (jax.lax.square(x) for x in jax.tree.leaves(tree))
    return jnp.sqrt(sum((jax.lax.reduce_sum(x, tuple(range(x.ndim))) for x in squares), 0.0))


def _clip(most: float) -> optax.GradientTransformationExtraArgs:
    """`optax.clip_by_global_norm`, which takes the `grad_norm` that the step knows already as a
    further argument of the update."""

    def update(
        updates: PyTree,
        state: PyTree,
        params: PyTree = None,
        *,
        grad_norm: jax.Array | None = None,
        **others: Any,
    ) -> tuple[PyTree, PyTree]:
        size = norm(updates) if grad_norm is None else grad_norm

        def leaf(u: jax.Array) -> jax.Array:
            return jax.lax.select(size < most, u, (u / size.astype(u.dtype)) * most)

        return jax.tree.map(leaf, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _clamp(rules: Sequence[Rule], claims: PyTree) -> optax.GradientTransformation:
    """Shortens updates so that parameters end within the `clamp` of their rule.

    claims: the index of each parameter's rule.
    """

    def update(updates: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, PyTree]:
        def leaf(u: jax.Array, p: jax.Array, i: int) -> jax.Array:
            clamp = rules[i].clamp
            return u if clamp is None else jnp.clip(p + u, *clamp) - p

        return jax.tree.map(leaf, updates, params, claims), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _descend(
    schedule: Callable[..., Any], horizons: PyTree
) -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_learning_rate` with a horizon for each parameter, and with the `lengths` of a
    `Schedule` as a further argument of the update. The state is the same."""

    def init(params: PyTree) -> optax.ScaleByScheduleState:
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

    def update(
        updates: PyTree,
        state: PyTree,
        params: PyTree = None,
        *,
        lengths: jax.Array | None = None,
        **others: Any,
    ) -> tuple[PyTree, optax.ScaleByScheduleState]:
        given = {} if lengths is None else {"lengths": lengths}
        rates = {
            share: schedule(state.count, **({} if share == 1 else {"horizon": share}), **given)
            for share in sorted(set(jax.tree.leaves(horizons)))
        }
        updates = jax.tree.map(lambda u, h: jnp.asarray(-rates[h], u.dtype) * u, updates, horizons)
        return updates, optax.ScaleByScheduleState(optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init, update)


class LookaheadState(NamedTuple):
    """The state of `_lookahead`."""

    count: jax.Array  # updates so far  # pyright: ignore[reportIncompatibleMethodOverride]
    slow: PyTree  # the slow weights


def _lookahead(config: LookaheadConfig) -> optax.GradientTransformation:
    """Every k-th update moves both the slow and the fast weights to the point between them.

    The moments stay as they are, as in `optax.lookahead`. That one is not used because it needs the
    parameters as pairs.
    """

    def init(params: PyTree) -> LookaheadState:
        return LookaheadState(jnp.int32(0), jax.tree.map(jnp.copy, params))

    def update(
        updates: PyTree, state: PyTree, params: PyTree = None
    ) -> tuple[PyTree, LookaheadState]:
        count = state.count + 1
        sync = count % config.k == 0

        def between(u: jax.Array, p: jax.Array, slow: jax.Array) -> jax.Array:
            return jnp.where(sync, slow + config.alpha * (p + u - slow) - p, u)

        updates = jax.tree.map(between, updates, params, state.slow)
        slow = jax.tree.map(
            lambda p, slow: jnp.where(sync, p, slow),
            optax.apply_updates(params, updates),
            state.slow,
        )
        return updates, LookaheadState(count, slow)

    return optax.GradientTransformation(init, update)


def make_optimizer(
    config: OptimizerConfig, schedule: Callable[..., Any], params: PyTree
) -> optax.GradientTransformation:
    """The optimizer for parameters with the paths and shapes of `params`, which may be abstract.

    The chain is: clip, coupled weight decay, moments, decoupled weight decay, learning rate, clamp,
    lookahead, average. Frozen parameters are outside of it. schedule: the result of
    `make_schedule`, or any function of the count if no rule has a horizon. Raises `ConfigError` for
    rules and `freeze` patterns that do not fit the parameters.
    """
    still = frozen(config.freeze, params)

    def trained(tree: PyTree) -> PyTree:
        """`tree` without the frozen parameters."""
        return jax.tree.map(lambda s, x: optax.MaskedNode() if s else x, still, tree)

    claims = trained(claim(config.rules, params))

    def by_rule(field: str) -> PyTree:
        """A field of each parameter's rule."""
        return jax.tree.map(lambda i: getattr(config.rules[i], field), claims)

    def scaled(factors: PyTree) -> optax.GradientTransformation:
        return optax.stateless(
            lambda updates, _: jax.tree.map(
                lambda u, f: u if np.all(f == 1.0) else u * jnp.asarray(f, u.dtype),
                updates,
                factors,
            )
        )

    rates = by_rule("learning_rate")
    if config.layer_decay < 1:
        layers = trained(layer_factors(config.layer_decay, params))
        rates = jax.tree.map(lambda rate, factor: rate * factor, rates, layers)
    factors = by_rule("weight_decay")
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
        chain.append(_clip(config.clip_norm))
    chain += [decay, moments] if config.decay == "coupled" else [moments, decay]
    chain += [scaled(rates), _descend(schedule, by_rule("horizon"))]
    chain.append(_clamp(config.rules, claims))
    if config.lookahead is not None:
        chain.append(_lookahead(config.lookahead))
    if config.average:
        chain.append(average.keep(config.average))
    if not config.freeze:
        return optax.chain(*chain)
    labels = jax.tree.map(lambda s: "still" if s else "moving", still)
    return optax.partition({"still": optax.set_to_zero(), "moving": optax.chain(*chain)}, labels)


def updates_done(opt_state: PyTree) -> jax.Array | None:
    """The number of updates that the schedule has counted: all steps but the skipped ones. None for
    an optimizer without a schedule."""

    def is_schedule(node: Any) -> bool:
        return isinstance(node, optax.ScaleByScheduleState)

    states = [s for s in jax.tree.leaves(opt_state, is_leaf=is_schedule) if is_schedule(s)]
    return states[0].count if states else None


def from_start(opt_state: PyTree) -> PyTree:
    """The optimizer's state with the schedule's count of updates at 0."""

    def is_schedule(node: Any) -> bool:
        return isinstance(node, optax.ScaleByScheduleState)

    def leaf(node: Any) -> Any:
        return node._replace(count=0 * node.count) if is_schedule(node) else node

    return jax.tree.map(leaf, opt_state, is_leaf=is_schedule)
