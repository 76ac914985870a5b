"""When a run is said to learn nothing, and when that is taken back."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny

from clipx.objectives.filip import FILIPFeatures
from clipx.training.step import embedding_variance, row_keys
from clipx.training.watch import Watch

CHANCE = math.log(128)
HEALTHY = {
    "loss": 0.5 * CHANCE,
    "chance_loss": CHANCE,
    "batch/image_variance": 0.6,
    "batch/text_variance": 0.5,
    "logit_scale": 20.0,
    "skipped": 0.0,
}


def watch(**fields):
    given = {"chance": {}, "bounds": (1.0, 100.0), "learning_rate": 1e-3}
    return Watch(start=50, span=100, **given | fields)


def said(watched, steps, **changes):
    """What is said over steps (from, to] logged every 10."""
    lines = []
    for step in range(steps[0] + 10, steps[1] + 1, 10):
        values = {name: x(step) if callable(x) else x for name, x in changes.items()}
        lines += watched.look(step, HEALTHY | values)
    return lines


def test_a_healthy_run_is_left_alone():
    """A start at chance is none of its business, nor a single bad line, nor a skipped step."""
    watched = watch()
    start = {"loss": CHANCE, "batch/text_variance": 1e-4, "logit_scale": 100.0}
    assert said(watched, (0, 50), **start) == []
    assert said(watched, (50, 300)) == [] and watched.holding == 0
    assert watched.look(310, HEALTHY | start) == []
    assert watched.look(320, HEALTHY | {"loss": math.nan, "skipped": 1.0}) == []
    assert said(watched, (320, 600)) == []


@pytest.mark.parametrize(
    "changes, name, advice",
    [
        ({"batch/image_variance": 1e-3}, "the image tower has collapsed", "learning_rate=0.0002"),
        ({"batch/text_variance": 1e-3}, "the text tower has collapsed", "captions are all alike"),
        ({"loss": CHANCE}, "loss is at chance", "captions do not belong to their pictures"),
        ({"logit_scale": 100.0}, "logit_scale is at its clamp (100)", "more data"),
        ({"logit_scale": 1.0}, "logit_scale is at its clamp (1)", "do not belong"),
    ],
)
def test_a_cause_is_said_once_and_when_it_goes(changes, name, advice):
    watched = watch()
    (line,) = said(watched, (50, 600), **changes)
    assert line.startswith("warning at step 150: ") and name in line and advice in line
    assert watched.holding == 1
    (line,) = said(watched, (600, 900))
    assert f"no longer: {name.partition(' (')[0]}" in line and watched.holding == 0
    (line,) = said(watched, (900, 1100), **changes)
    assert name in line


def test_a_cause_that_gets_worse_is_said_again():
    watched = watch()
    shrinking = said(
        watched, (50, 1050), **{"batch/image_variance": lambda step: 10 ** (-1 - step / 200)}
    )
    levels = [line.split("variance ")[1].split(",")[0] for line in shrinking]
    assert levels == ["0.01", "0.001", "0.0001", "1e-05", "1e-06"]  # not at every logged step
    assert len(said(watched, (1050, 1300), loss=1.01 * CHANCE)) == 1 + 1  # the other has gone
    assert len(said(watched, (1300, 1600), loss=2 * CHANCE)) == 1
    assert said(watched, (1600, 1900), loss=1.01 * CHANCE) == []  # not as bad: said already


def test_the_term_of_the_pairs_counts():
    """Masked words are learned while pairs are not: the sum is far below chance."""
    watched = watch(chance={"loss/contrastive": CHANCE})
    (line,) = said(watched, (50, 300), **{"loss/contrastive": CHANCE})
    assert "loss/contrastive is at chance" in line


@pytest.mark.slow  # compiles four losses
@pytest.mark.parametrize("name", ["clip_lite", "declip", "protoclip", "slip"])
def test_chance_is_what_equal_outputs_give(name):
    """The numbers that the watch compares with, where the loss has terms of other kinds too."""
    module, variables = tiny.objective(name), tiny.variables(name)
    keys = row_keys(0, jnp.int32(0), tiny.ROWS)
    embed = functools.partial(module.apply, train=True, method="embed", mutable=["batch_stats"])
    shapes, _ = jax.eval_shape(embed, variables, tiny.batch(module), keys)

    @jax.jit
    def loss(features):
        return module.apply(
            variables, features, tiny.memory(module), train=True, method="loss",
            mutable=["batch_stats"],
        )[0].metrics  # fmt: skip

    rng = np.random.default_rng(0)
    same = jax.tree.map(
        lambda x: np.broadcast_to(rng.normal(size=x.shape[1:]), x.shape).astype(x.dtype), shapes
    )
    chance, metrics = module.chance(tiny.ROWS), loss(same)
    assert chance and all(np.isclose(metrics[name], x, rtol=0.01) for name, x in chance.items())


def test_the_variance_of_embeddings():
    rng = np.random.default_rng(0)
    apart = rng.normal(size=(64, 32)).astype(np.float32)
    tokens = np.broadcast_to(apart[:1, None] * 7, (64, 5, 32))
    features = FILIPFeatures(image_tokens=tokens, text_tokens=tokens, image=apart * 3)
    variance = embedding_variance(features)
    rows = apart / np.linalg.norm(apart, axis=1, keepdims=True)
    assert np.isclose(variance["batch/image_variance"], rows.var(axis=0).sum(), rtol=1e-5)
    assert variance["batch/text_variance"] < 1e-6
