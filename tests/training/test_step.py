"""The training step where the laws do not apply: towers with BatchNorm, and equal captions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import tiny
from support.runs import small

from clipx.models.resnet import ResNet
from clipx.objectives.base import caption_ids
from clipx.objectives.clip import CLIP
from clipx.training.run import assemble
from clipx.training.step import init_state, make_train_step, row_keys


@pytest.mark.slow  # compiles two steps of a ResNet
def test_batch_norm_statistics_move_once_per_micro_batch():
    text = tiny.objective("clip", dropout=0.0).text
    image = ResNet(image_size=16, width=8, blocks=(1,), embed_dim=8, dtype="float32")
    objective, optimizer = CLIP(image=image, text=text), optax.sgd(1e-3)
    batch = tiny.batch(objective, rows=8)
    state = jax.jit(lambda b: init_state(objective, optimizer, b, seed=0))(batch)
    step = make_train_step(objective, optimizer, seed=0, microbatches=2)
    after, metrics = jax.jit(step)(state, batch)
    assert np.isfinite(metrics["loss"]) and after.step == 1 and "updates" not in metrics

    @jax.jit
    def embed(stats, batch, keys):
        variables = {"params": state.params, "batch_stats": stats}
        return objective.apply(
            variables, batch, keys, train=True, method="embed", mutable=["batch_stats"]
        )[1]["batch_stats"]

    stats, keys = state.batch_stats, row_keys(0, jnp.int32(0), 8)
    for rows in (slice(0, None, 2), slice(1, None, 2)):
        stats = embed(stats, jax.tree.map(lambda x, rows=rows: x[rows], batch), keys[rows])
    for before, x, y in zip(*map(jax.tree.leaves, (state.batch_stats, stats, after.batch_stats))):
        np.testing.assert_allclose(x, y, atol=1e-5)
        assert np.any(before != y)


def test_different_captions_have_different_ids():
    text = np.random.default_rng(0).integers(0, 49408, (4096, 77)).astype(np.int32)
    text[1] = text[0]
    text[2] = text[3][::-1]
    ids = np.asarray(jax.jit(caption_ids)(text))
    assert ids[0] == ids[1] and len(np.unique(ids)) == 4095


def test_equal_captions_are_counted_and_masked():
    batch = tiny.batch(tiny.objective("clip"), rows=8)
    twice = batch.replace(text=batch.text.copy())
    twice.text[3] = twice.text[5]
    metrics, losses = [], []
    for name in ("clip:false_negatives=keep", "clip:false_negatives=mask"):
        objective, optimizer = tiny.objective(name), optax.sgd(1e-3)
        init = functools.partial(init_state, objective, optimizer, seed=0)
        state = jax.jit(init)(batch)
        step = jax.jit(make_train_step(objective, optimizer, seed=0))
        for data in (batch, twice):
            logged = step(state, data)[1]
            metrics.append(float(logged["batch/duplicate_captions"]))
            losses.append(float(logged["loss"]))
    assert metrics == [0, 0.25, 0, 0.25]
    assert losses[0] == losses[2] and losses[1] > losses[3]


def test_runs_of_another_length_have_the_same_program():
    runs = [
        assemble(small(("train.total_steps", steps), ("seed", seed)), jax.devices()[:1])
        for steps, seed in (("12", "0"), ("30", "0"), ("12", "1"))
    ]
    assert runs[0].program_key == runs[1].program_key != runs[2].program_key
    assert runs[0].schedule.lengths.tolist() != runs[1].schedule.lengths.tolist()
