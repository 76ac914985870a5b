"""Schedules, rules and clamps against plain optax, layer decay, freezing, and skipped steps."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from support import load_oracle, tiny

from clipx.config.binding import bind
from clipx.errors import ConfigError
from clipx.models.base import HEAD, Tower
from clipx.models.bert import BERT
from clipx.models.layers import BatchNorm, drop, dropout_keys
from clipx.models.resnet import ResNet
from clipx.models.vit import ViT
from clipx.objectives.clip import CLIP
from clipx.parallel.mesh import path_name
from clipx.training.optimizer import (
    LookaheadConfig,
    OptimizerConfig,
    make_optimizer,
    updates_done,
)
from clipx.training.parameter_rules import Rule, claim, layer_factors, locked
from clipx.training.schedule import make_schedule
from clipx.training.step import init_state, make_train_step
from clipx.types import Loss, TrainState

ORACLE = load_oracle("protoclip")["sched"]
PARAMS = {
    "image": {"fc": {"kernel": np.full((3, 2), 0.5, np.float32), "bias": np.ones(2, np.float32)}},
    "logit_scale": np.float32(math.log(10)),
}
GRADS = jax.tree.map(lambda x: np.linspace(-1, 2, x.size, dtype=x.dtype).reshape(x.shape), PARAMS)


def schedule(**values):
    config = OptimizerConfig(learning_rate=0.5, final_learning_rate=0.1, **values)
    return make_schedule(config, steps=100, batch_size=8, rows=None)


@pytest.mark.parametrize(
    "name, middle, end", [("cosine", 0.3, 0.1), ("linear", 0.3, 0.1), ("constant", 0.5, 0.5)]
)
def test_schedule(name, middle, end):
    found = [schedule(schedule=name, warmup_steps=20)(step) for step in (0, 10, 20, 60, 100)]
    np.testing.assert_allclose(found, [0, 0.25, 0.5, middle, end], rtol=1e-6)
    np.testing.assert_allclose(schedule(schedule=name)(0), 0.5, rtol=1e-6)


def test_cosine_is_not_linear():
    np.testing.assert_allclose(schedule()(25), 0.1 + 0.2 * (1 + math.cos(math.pi / 4)), rtol=1e-6)
    np.testing.assert_allclose(schedule(schedule="linear")(25), 0.4, rtol=1e-6)


def test_cosine_is_the_square_of_half_its_angle():
    """CLIP-Lite's lr_scheduler.py with a warm-up of 5 of 20 steps; cos^2 x = (1 + cos 2x) / 2."""
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=5)
    with jax.enable_x64(True):
        multiplier = make_schedule(config, steps=20, batch_size=1, rows=None)
        found = [float(multiplier(jnp.float64(t))) for t in range(21)]
    exact = [t / 5 if t < 5 else math.cos(math.pi / 2 * (t - 5) / 15) ** 2 for t in range(21)]
    np.testing.assert_allclose(found, exact, rtol=0, atol=1e-9)
    printed = "0 .2 .4 .6 .8 1 .98907 .95677 .90451 .83457 .75 .65451 .55226 .44774 .34549 .25"
    printed += " .16543 .09549 .04323 .01093 0"
    np.testing.assert_allclose(found, [float(x) for x in printed.split()], rtol=0, atol=5e-6)


def test_warmup_that_starts_above_zero():
    found = [schedule(warmup_steps=20, warmup_from=0.1)(step) for step in (0, 10, 20, 100)]
    np.testing.assert_allclose(found, [0.1, 0.3, 0.5, 0.1], rtol=1e-6)


def test_warmup_in_other_units():
    np.testing.assert_allclose(schedule(warmup_examples=160)(10), 0.25)  # 20 steps of 8
    config = OptimizerConfig(learning_rate=0.5, warmup_epochs=2.0)
    by_epochs = make_schedule(config, steps=100, batch_size=8, rows=83)  # 10 steps an epoch
    np.testing.assert_allclose([by_epochs(10), by_epochs(20)], [0.25, 0.5])
    assert make_schedule(config, steps=None, batch_size=8, rows=None)(7) == 0.5


def test_warmup_longer_than_the_run():
    with pytest.raises(ConfigError) as error:
        schedule(warmup_steps=101)
    assert error.value.where == "config.optimizer.warmup_steps"
    assert "101 steps" in error.value.found and "100 steps" in error.value.expected
    with pytest.raises(ConfigError, match="a warm-up of 60 steps and 41 more"):
        schedule(warmup_steps=60, hold_steps=41)


@pytest.mark.parametrize(
    "run, lr, warm, steps, horizon",
    [
        ("single_gpu", 5e-5, 2000, 312_500, 98 / 100),
        ("eight_gpu", 5e-4, 15_625, 156_400, 398 / 400),
    ],
)
def test_protoclips_two_rates(run, lr, warm, steps, horizon):
    """ProtoCLIP's training/scheduler.py: lr (t+1)/w until t = w, then half a cosine. For the image
    tower it ends at the start of the last but one of E episodes: share (E-2)/E of the run."""
    config = OptimizerConfig(
        learning_rate=lr,
        warmup_from=lr / warm,
        warmup_steps=warm - 1,
        hold_steps=1,
        rules=(Rule("^image/", horizon=horizon), Rule(".*")),
    )
    assert len(ORACLE[run]) == 8
    with jax.enable_x64(True):
        rate = make_schedule(config, steps=steps, batch_size=64, rows=None)
        for t, (visual, rest) in ORACLE[run].items():
            found = [float(rate(jnp.int64(t), horizon=horizon)), float(rate(jnp.int64(t)))]
            # 1 + cos(x) near x = pi has no more exact digits than this
            np.testing.assert_allclose(found, [visual, rest], rtol=1e-9, atol=1e-15 * lr)


@pytest.mark.parametrize("name, middle", [("cosine", 0.3), ("linear", 0.3)])
def test_horizons(name, middle):
    """One warm-up, held for 10 updates; decays that end halfway through the run and at its end."""
    rules = (Rule("a", horizon=0.5), Rule(".*"))
    rate = schedule(schedule=name, warmup_steps=10, hold_steps=10, rules=rules)
    short = [rate(t, horizon=0.5) for t in (5, 10, 20, 35, 50, 51, 100)]
    np.testing.assert_allclose(short, [0.25, 0.5, 0.5, middle, 0.1, 0.1, 0.1], rtol=1e-6)
    np.testing.assert_allclose([rate(t) for t in (5, 20, 60, 100)], [0.25, 0.5, middle, 0.1])
    held = schedule(schedule=name, hold_steps=20)
    np.testing.assert_allclose([held(t) for t in (0, 20, 60, 100)], [0.5, 0.5, middle, 0.1])


def test_a_horizon_inside_the_warmup():
    with pytest.raises(ConfigError) as error:
        schedule(warmup_steps=15, hold_steps=6, rules=(Rule("a"), Rule(".*", horizon=0.2)))
    assert error.value.where == "config.optimizer.rules[1].horizon"
    assert "step 20" in error.value.found and "step 21" in error.value.expected


@pytest.mark.parametrize(
    "section, where",
    [
        ({"learning_rate": -1e-3}, "learning_rate"),
        ({"warmup_from": -1e-4}, "warmup_from"),
        ({"b1": 1.0}, "b1"),
        ({"clip_norm": 0}, "clip_norm"),
        ({"mu_dtype": "bfloat"}, "mu_dtype"),
        ({"name": "adam"}, "name"),
        ({"decay": "l2"}, "decay"),
        ({"hold_steps": -1}, "hold_steps"),
        ({"rules": [{"pattern": ".*", "horizon": 0.0}]}, "rules[0].horizon"),
        ({"rules": [{"pattern": ".*", "horizon": 1.01}]}, "rules[0].horizon"),
        (
            {"schedule": "constant", "rules": [Rule("x"), Rule("y", horizon=0.5)]},
            "rules[1].horizon",
        ),
        ({"lookahead": {"k": 0}}, "lookahead.k"),
        ({"lookahead": {"alpha": 0}}, "lookahead.alpha"),
        ({"rules": [{"pattern": ".*"}, {"pattern": "x", "clamp": (1, 0)}]}, "rules[1].clamp"),
        ({"rules": [{"patern": ".*"}]}, "rules[0].patern"),
    ],
)
def test_wrong_values(section, where):
    with pytest.raises(ConfigError) as error:
        bind(OptimizerConfig, section, where="config.optimizer")
    assert error.value.where == f"config.optimizer.{where}"


def test_the_first_rule_that_matches_claims():
    claims = claim((Rule("bias$"), Rule("fc"), Rule(".*")), PARAMS)
    assert claims == {"image": {"fc": {"kernel": 1, "bias": 0}}, "logit_scale": 2}


@pytest.mark.parametrize(
    "patterns, where, found",
    [
        (("bias$", ".*", "nothing"), "[2]", "'nothing' matches no parameter"),
        (("fc", "bias$", ".*"), "[1]", "only parameters of earlier rules, such as image/fc/bias"),
        (("fc",), "", "no rule for logit_scale"),
        (("(", ".*"), "[0].pattern", "'('"),
    ],
)
def test_wrong_rules(patterns, where, found):
    with pytest.raises(ConfigError) as error:
        claim(tuple(Rule(p) for p in patterns), PARAMS)
    assert error.value.where == f"config.optimizer.rules{where}"
    assert found in error.value.found


def steps(optimizer, count=3, params=PARAMS, grads=GRADS):
    """The parameters after `count` updates, each with other gradients."""
    state = optimizer.init(params)
    for i in range(count):
        scaled = jax.tree.map(lambda g, i=i: g * (1 + i), grads)
        updates, state = optimizer.update(scaled, state, params)
        params = optax.apply_updates(params, updates)
    return params


def make(*rules, lr=0.01, **values):
    config = OptimizerConfig(rules=rules or (Rule(".*"),), **values)
    return make_optimizer(config, lambda count: lr / (1.0 + count), PARAMS)


def assert_same(a, b):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), a, b)


def test_adamw_is_optax():
    values = {"b1": 0.8, "b2": 0.95, "eps": 1e-5, "weight_decay": 0.3}
    plain = optax.adamw(lambda count: 0.01 / (1.0 + count), **values)
    assert_same(steps(make(**values)), steps(plain))


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_is_optax(nesterov):
    plain = optax.sgd(lambda count: 0.01 / (1.0 + count), momentum=0.8, nesterov=nesterov)
    ours = make(name="sgd", momentum=0.8, nesterov=nesterov, weight_decay=0.0)
    assert_same(steps(ours), steps(plain))


def test_coupled_decay_goes_through_the_momentum_after_the_clip():
    """torch's SGD behind `clip_grad_norm_`: v <- 0.9 v + clip(g) + decay p; p <- p - lr v."""
    norm = float(optax.tree.norm(GRADS))
    p, v = (jax.tree.map(lambda x, k=k: k * x.astype(np.float64), PARAMS) for k in (1, 0))
    for i in range(3):
        clip = min(1, 0.5 / (norm * (1 + i)))
        g = jax.tree.map(lambda g, p, i=i, c=clip: g * (1 + i) * c + 0.3 * p, GRADS, p)
        v = jax.tree.map(lambda v, g: 0.9 * v + g, v, g)
        p = jax.tree.map(lambda p, v, i=i: p - 0.01 / (1 + i) * v, p, v)
    values = {"name": "sgd", "weight_decay": 0.3, "clip_norm": 0.5}
    assert_same(steps(make(decay="coupled", **values)), p)
    apart = steps(make(**values))["image"]["fc"]["kernel"]
    assert np.abs(apart - p["image"]["fc"]["kernel"]).max() > 1e-4


def test_each_tower_has_its_rate():
    """0.2 for the image tower, and 0.001 for the rest by a rule with the factor 0.005."""
    values = {"name": "sgd", "decay": "coupled", "weight_decay": 1e-4, "clip_norm": 10.0}
    found = steps(make(Rule("^image/"), Rule(".*", learning_rate=0.005), lr=0.2, **values))
    fast, slow = (steps(make(lr=lr, **values)) for lr in (0.2, 0.001))
    assert_same(found, {"image": fast["image"], "logit_scale": slow["logit_scale"]})


def horizons(*rules, steps=4):
    """(SGD without momentum, its schedule, whose rate is 0 at the end of each horizon)."""
    config = OptimizerConfig(name="sgd", momentum=0.0, learning_rate=0.1, rules=rules)
    rate = make_schedule(config, steps=steps, batch_size=8, rows=None)
    return make_optimizer(config, rate, PARAMS), rate


def test_a_parameter_stays_from_its_horizon_on():
    """Its weight decay stops too. The other parameters keep the rates of a run without horizons."""
    frozen, rate = horizons(Rule("^image/", horizon=0.5), Rule(".*"))
    plain, _ = horizons(Rule("^image/"), Rule(".*"))
    two, four = (steps(frozen, n) for n in (2, 4))
    assert_bits(two["image"], four["image"])
    assert_bits(steps(plain, 4)["logit_scale"], four["logit_scale"])
    assert np.abs(steps(plain, 4)["image"]["fc"]["bias"] - four["image"]["fc"]["bias"]).max() > 0.1
    kernel = PARAMS["image"]["fc"]["kernel"]
    for i in range(2):
        decayed = GRADS["image"]["fc"]["kernel"] * (1 + i) + 0.2 * kernel
        kernel = kernel - float(rate(i, horizon=0.5)) * decayed
    np.testing.assert_allclose(four["image"]["fc"]["kernel"], kernel, rtol=1e-6)


def test_a_horizon_leaves_the_state_and_the_main_rate_alone():
    """So a checkpoint of a run without horizons fits, and the state has optax's structure."""
    (frozen, rate), (plain, main) = (
        horizons(Rule("^image/", horizon=0.5), Rule(".*")),
        horizons(Rule("^image/"), Rule(".*")),
    )
    states = [jax.jit(o.init)(PARAMS) for o in (frozen, plain)]
    assert_bits(*states)
    schedules = [s for s in states[1] if isinstance(s, optax.ScaleByScheduleState)]
    assert_bits(schedules, [optax.scale_by_learning_rate(lambda n: 1.0).init(PARAMS)])
    assert [float(rate(t)) for t in range(5)] == [float(main(t)) for t in range(5)]
    _, state = frozen.update(GRADS, states[0], PARAMS)
    assert updates_done(state) == 1


def test_one_program_is_for_runs_of_any_length():
    """What depends on the length is an argument, which replaces the schedule's own numbers."""
    rules = Rule("^image/", horizon=0.5), Rule(".*")
    (short, rate), (long, other) = horizons(*rules), horizons(*rules, steps=12)
    update = jax.jit(short.update)
    for optimizer, schedule in ((short, rate), (long, other)):
        state = exact = optimizer.init(PARAMS)
        for _ in range(3):
            found, state = update(GRADS, state, PARAMS, lengths=jnp.asarray(schedule.lengths))
            expected, exact = optimizer.update(GRADS, exact, PARAMS)
            assert_same(found, expected)
    assert [float(rate(t, lengths=other.lengths)) for t in range(13)] == [
        float(other(t)) for t in range(13)
    ]


LOOKAHEAD = LookaheadConfig(k=5, alpha=0.5)


def quadratic(steps: int, optimizer):
    """(p after each step on p^2 / 2 from p = 1, the optimizer's last state)."""
    p, trace = {"p": jnp.float64(1)}, []
    state = optimizer.init(p)
    update = jax.jit(optimizer.update)
    for _ in range(steps):
        updates, state = update(p, state, p)
        p = optax.apply_updates(p, updates)
        trace.append(float(p["p"]))
    return trace, state


def test_lookahead_syncs_every_fifth_step():
    """CLIP-Lite's optim/lookahead.py around SGD at rate 0.1. It does not touch the momentum."""
    config = OptimizerConfig(name="sgd", weight_decay=0.0, lookahead=LOOKAHEAD, rules=(Rule(".*"),))
    with jax.enable_x64(True):
        trace, state = quadratic(12, make_optimizer(config, lambda _: 0.1, {"p": 1.0}))
    printed = [0.9, 0.72, 0.486, 0.2268, 0.48542, 0.206514, -0.065153, -0.303138, -0.48701]
    np.testing.assert_allclose(trace, [*printed, -0.059187, -0.158374, -0.231805], atol=6e-7)
    p, v, slow = 1.0, 0.0, 1.0
    for i, found in enumerate(trace, 1):
        v = 0.9 * v + p
        p -= 0.1 * v
        if i % 5 == 0:
            p = slow = 0.5 * p + 0.5 * slow
        np.testing.assert_allclose(found, p, rtol=0, atol=1e-9)
    assert float(state[-1].slow["p"]) == trace[9] and state[-1].count == 12


def test_lookahead_keeps_clamps_and_a_copy_of_the_parameters():
    optimizer = make(Rule("scale$", clamp=(2.0, 2.4)), Rule(".*"), lr=1.0, lookahead=LOOKAHEAD)
    state = jax.jit(optimizer.init)(PARAMS)
    jax.tree.map(np.testing.assert_array_equal, state[-1].slow, PARAMS)
    after = [steps(optimizer, count)["logit_scale"] for count in (4, 5)]
    np.testing.assert_allclose(after, [2.4, (math.log(10) + 2.4) / 2], rtol=1e-6)


def test_multipliers_scale_updates():
    """A rule with ten times the learning rate and half the decay; other parameters as in optax."""

    def plain(lr, weight_decay):
        return steps(
            optax.adamw(lambda n: lr / (1.0 + n), 0.9, 0.98, 1e-6, weight_decay=weight_decay)
        )

    kernel = Rule("kernel$", learning_rate=10.0, weight_decay=0.5)
    updated, expected = steps(make(kernel, Rule(".*"), weight_decay=0.3)), plain(0.01, 0.3)
    assert np.abs(updated["image"]["fc"]["kernel"] - expected["image"]["fc"]["kernel"]).max() > 0.01
    expected["image"]["fc"]["kernel"] = plain(0.1, 0.15)["image"]["fc"]["kernel"]
    assert_same(updated, expected)


def test_zero_multipliers():
    """Without a learning rate the parameter stays. Without decay it moves as under plain Adam."""
    moved = steps(make(Rule("bias$", learning_rate=0.0), Rule(".*", weight_decay=0.0)))
    np.testing.assert_array_equal(moved["image"]["fc"]["bias"], PARAMS["image"]["fc"]["bias"])
    adam = steps(optax.adam(lambda count: 0.01 / (1.0 + count), 0.9, 0.98, 1e-6))
    np.testing.assert_allclose(moved["image"]["fc"]["kernel"], adam["image"]["fc"]["kernel"])


def test_clip_norm():
    plain = optax.chain(
        optax.clip_by_global_norm(0.1), optax.sgd(lambda count: 1 / (1.0 + count), momentum=0.9)
    )
    ours = make(lr=1.0, name="sgd", weight_decay=0.0, clip_norm=0.1)
    assert_same(steps(ours), steps(plain))


@pytest.mark.parametrize("sign, bound", [(-1, math.log(100)), (1, 0.0)])
def test_clamp(sign, bound):
    """The default rules keep `logit_scale`, and only that, in [0, ln 100] for any gradient."""
    optimizer = make_optimizer(OptimizerConfig(name="sgd"), lambda count: 1.0, PARAMS)
    grads = jax.tree.map(lambda g: np.full_like(g, sign * 1e8), PARAMS)
    after = steps(optimizer, 1, grads=grads)
    np.testing.assert_allclose(after["logit_scale"], bound, atol=1e-5)
    assert np.abs(after["image"]["fc"]["bias"]).min() > 1e7


def test_default_rules():
    """Matrices have weight decay; gains, biases and logit scalars have none."""
    params = {
        f"{name}": np.ones(2, np.float32)
        for name in ("kernel", "bias", "scale", "logit_bias", "positional_embedding", "probe")
    }
    params["logit_scale"] = np.float32(1)
    optimizer = make_optimizer(OptimizerConfig(weight_decay=0.5), lambda count: 1.0, params)
    after = steps(optimizer, 1, params, jax.tree.map(np.zeros_like, params))
    decayed = {name for name, x in after.items() if np.all(x == 0.5)}
    kept = {name for name, x in after.items() if np.all(x == 1.0)}
    assert decayed == {"kernel", "positional_embedding"}
    assert kept == set(params) - decayed


def test_default_rules_need_no_logit_scale():
    params = {"kernel": np.ones(2, np.float32)}
    assert claim(OptimizerConfig().rules, params) == {"kernel": 2}
    with pytest.raises(ConfigError, match="matches no parameter"):
        claim((Rule("logit_scale"), Rule(".*")), params)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_mu_dtype(name):
    def dtypes(mu_dtype):
        return [x.dtype for x in jax.tree.leaves(make(name=name, mu_dtype=mu_dtype).init(PARAMS))]

    leaves = len(jax.tree.leaves(PARAMS))
    assert dtypes("bfloat16").count(jnp.bfloat16) == leaves
    assert dtypes("float32").count(jnp.bfloat16) == 0
    moved = steps(make(name=name, mu_dtype="bfloat16"))
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(moved))
    for x, y in zip(*map(jax.tree.leaves, (moved, steps(make(name=name))))):
        np.testing.assert_allclose(x, y, rtol=0.01)


class Remembering(CLIP):
    """An objective with a memory: the sum of all image features."""

    def init_memory(self):
        return {"seen": jnp.zeros(self.image.embed_dim)}

    def loss(self, features, memory, *, train):
        value, metrics, memory = super().loss(features, memory, train=train)
        return Loss(value, metrics, {"seen": memory["seen"] + features.image.sum(0)})


@pytest.fixture(scope="module")
def training():
    """(the step of a tiny objective with BatchNorm and a memory, its state after one step, a
    batch)."""
    image = ResNet(
        variant="resnet18", image_size=16, width=8, blocks=(1,), embed_dim=8, dtype="float32"
    )
    module = Remembering(image=image, text=tiny.objective("clip").text)
    batch = tiny.batch(module)
    params = jax.eval_shape(lambda: init_state(module, optax.identity(), batch, seed=0).params)
    schedule = optax.linear_schedule(1e-2, 0.0, 10)
    optimizer = make_optimizer(OptimizerConfig(clip_norm=1.0), schedule, params)
    state = jax.jit(lambda: init_state(module, optimizer, batch, seed=0))()
    step = jax.jit(make_train_step(module, optimizer, seed=0))
    state, metrics = step(state, batch)
    assert metrics["skipped"] == 0 and np.any(state.memory["seen"])
    return step, state, batch


def assert_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def with_scale(state: TrainState, value) -> TrainState:
    return state.replace(params={**state.params, "logit_scale": jnp.float32(value)})


@pytest.mark.parametrize("value", [np.nan, 1e6])  # exp(1e6): a scale of infinity
def test_a_step_that_is_not_finite_changes_nothing(training, value):
    """Parameters, optimizer, running statistics and memory keep their bits; the step counts on."""
    step, state, batch = training
    bad = with_scale(state, value)
    after, metrics = step(bad, batch)
    assert metrics["skipped"] == 1 and metrics["updates"] == 1
    assert after.step == bad.step + 1
    assert_bits(after.replace(step=bad.step), bad)


def test_the_next_step_is_as_if_the_bad_one_had_not_been(training):
    step, state, batch = training
    skipped, _ = step(with_scale(state, np.nan), batch)
    repaired = with_scale(skipped, state.params["logit_scale"])
    expected, _ = step(state.replace(step=state.step + 1), batch)  # the same step, so equal keys
    new, metrics = step(repaired, batch)
    assert_bits(new, expected)
    assert metrics["skipped"] == 0
    assert updates_done(new.opt_state) == 2 and new.step == 3
    for part in ("params", "batch_stats", "memory"):
        before, after = (jax.tree.leaves(getattr(s, part)) for s in (state, new))
        assert all(np.any(x != y) for x, y in zip(before, after)), part


def names(tree):
    return {path_name(path): x for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]}


@pytest.mark.parametrize("scan", [False, True])
def test_layer_decay_of_transformers(scan):
    """In both layouts of the blocks: the top and heads have the full rate, each block below it
    half of that, and the embeddings the least."""
    fields = {"width": 8, "depth": 3, "heads": 2, "embed_dim": 4, "scan": scan}
    vit = ViT(image_size=16, patch=8, **fields)
    params = jax.eval_shape(vit.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
    found = names(layer_factors(0.5, {"image": params, "head": {"kernel": PARAMS["logit_scale"]}}))
    blocks = [0.125, 0.25, 0.5]
    for path, factor in found.items():
        part = path.split("/")[1]
        if part == "transformer" and scan:
            np.testing.assert_array_equal(np.ravel(factor), blocks)
        elif part == "transformer":
            assert factor == blocks[int(path.split("_")[1].split("/")[0])]
        else:
            above = part in ("ln_post", "projection", "kernel")
            assert factor == (1 if above else 0.0625), path


def test_layer_decay_of_a_resnet():
    resnet = ResNet(variant="RN50", width=2, blocks=(1, 2), image_size=16, embed_dim=4)
    params = jax.eval_shape(resnet.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
    found = {}
    for path, factor in names(layer_factors(0.5, {"image": params})).items():
        found.setdefault(path.split("/")[1], set()).add(factor)
    assert found["stage_0_0"] == {0.125} and found["stage_1_1"] == {0.5}
    assert found["conv1"] == found["bn3"] == {0.0625}
    assert found["pool"] == found["projection"] == {1.0}


def test_layer_decay_of_berts_kin():
    bert = BERT(width=8, depth=2, heads=2, relative_buckets=4, dense_width=4, embed_dim=4)
    params = jax.eval_shape(bert.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    found = {}
    for path, factor in names(layer_factors(0.5, {"text": params})).items():
        found.setdefault(path.split("/")[1], set()).add(factor)
    below = {name for name in found if name.endswith("_embedding")} | {"relative_bias"}
    assert {name for name, factors in found.items() if factors == {0.125}} == below
    assert found["block_0"] == {0.25} and found["block_1"] == {0.5}
    assert found["pooler"] == found["dense"] == found["projection"] == {1.0}


def test_what_is_frozen_stays():
    """A frozen parameter has no moments and no weight decay, and is not in the gradient's norm. The
    others move as if it did not exist."""
    config = OptimizerConfig(
        freeze=("^image/fc/kernel$",), clip_norm=1.0, rules=(Rule("."),), weight_decay=0.5
    )
    rest = {"image": {"fc": {"bias": PARAMS["image"]["fc"]["bias"]}}, "logit_scale": np.float32(2)}
    alone = dataclasses.replace(config, freeze=())
    updates = {}
    for name, (c, params) in {"frozen": (config, PARAMS), "alone": (alone, rest)}.items():
        grads = jax.tree.map(lambda x: 3 * np.ones_like(x), params)
        optimizer = make_optimizer(c, lambda count: 0.1, params)
        state = optimizer.init(params)
        updates[name], state = optimizer.update(
            grads, state, {**params, "logit_scale": np.float32(2)}
        )
        assert updates_done(state) == 1
        assert not any(path.endswith("fc/kernel") for path in names(state))
    assert not np.any(updates["frozen"]["image"]["fc"]["kernel"])
    found, alone = (
        {"x": u["image"]["fc"]["bias"], "y": u["logit_scale"]} for u in updates.values()
    )
    jax.tree.map(np.testing.assert_array_equal, found, alone)
    assert all(np.all(x != 0) for x in found.values())
    with pytest.raises(ConfigError, match="matches no parameter"):
        make_optimizer(dataclasses.replace(config, freeze=("^img/",)), lambda count: 0.1, PARAMS)
    with pytest.raises(ConfigError, match="a regex"):
        make_optimizer(dataclasses.replace(config, freeze=("(",)), lambda count: 0.1, PARAMS)


class Normed(Tower):
    """A BatchNorm over pictures' channels, and dropout."""

    image_size: int = 16

    @property
    def backbone_width(self):
        return 3 * self.image_size**2

    @nn.compact
    def features(self, x, *, train=False, keys=None):
        x = BatchNorm(name="bn")(x, train=train).reshape(x.shape[0], 1, -1)
        x = drop(x, 0.5, dropout_keys(0.5, train, keys), 0)
        return x[:, 0], x


def test_a_locked_tower_runs_as_in_evaluation():
    """A tower that is frozen completely has no gradient, no dropout and constant statistics."""
    towers = {"embed_dim": 8, "dtype": "float32"}
    module = CLIP(image=Normed(**towers), text=tiny.Linear(**towers), locked=("image",))
    batch, keys = tiny.batch(module, 4), jax.random.split(jax.random.key(0), 4)
    variables = jax.jit(module.init)(jax.random.key(0), batch, keys, {})
    assert locked(("^image/",), variables["params"]) == ("image",)
    assert locked(("^image/(?!projection)", "^logit"), variables["params"]) == ()
    assert locked(("^image/(?!projection)",), variables["params"], HEAD) == ("image",)
    assert locked(("^image/projection",), variables["params"], HEAD) == ()

    def loss(module, params):
        loss, changed = module.apply(
            {**variables, "params": params}, batch, keys, {}, mutable=["batch_stats"]
        )
        return loss.value, changed.get("batch_stats", variables["batch_stats"])

    def moved(module):
        step = jax.jit(jax.grad(functools.partial(loss, module), has_aux=True))
        grads, stats = step(variables["params"])
        old = variables["batch_stats"]["image"]["bn"]["mean"]
        at = {
            name: any(np.any(x) for x in jax.tree.leaves(grads[name])) for name in ("image", "text")
        }
        return at | {"stats": bool(np.any(stats["image"]["bn"]["mean"] != old))}

    assert moved(module) == {"image": False, "text": True, "stats": False}
    assert moved(module.clone(locked=())) == {"image": True, "text": True, "stats": True}
    # with a head that trains on frozen features, only the head has a gradient
    below = module.clone(locked=(), locked_features=("image",))
    assert moved(below) == {"image": True, "text": True, "stats": False}
    gradient = jax.grad(lambda p: loss(below, p)[0])(variables["params"])["image"]
    assert not any(np.any(x) for x in jax.tree.leaves(gradient["bn"]))
