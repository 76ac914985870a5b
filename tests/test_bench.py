"""`clipx.bench`: its float64 reference is right, and it times the run's own step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.runs import small

from clipx.parallel.mesh import MeshConfig, make_mesh
from clipx.planning import measure
from clipx.training.run import assemble


def test_the_dense_twin_is_its_own_gradient():
    a, b = np.random.default_rng(0).normal(size=(2, 6, 4))

    def mean(a):
        logits = 2.0 * a @ b.T
        lse = jax.nn.logsumexp(logits, 0) + jax.nn.logsumexp(logits, 1)
        return jnp.mean(0.5 * lse - jnp.diag(logits))

    with jax.enable_x64(True):
        value, gradient = measure.dense_info_nce(a, b, 2.0)
        np.testing.assert_allclose(value.mean(), mean(a), rtol=1e-12)
        np.testing.assert_allclose(gradient, jax.grad(mean)(a), rtol=1e-9, atol=1e-12)


def test_the_losses_of_these_devices_are_right():
    assert measure.check_losses(make_mesh(MeshConfig()), rows=64, width=16) < 1e-5


@pytest.mark.slow  # a training step is compiled to be timed
def test_steps_are_timed():
    run = assemble(small(), jax.devices()[:1])
    assert all(second > 0 for second in measure.time_steps(run, 2))


def test_texts_of_noise_end_once():
    run = assemble(small(("tokenizer.marks", "end")), jax.devices()[:1])
    text, end = np.asarray(measure.random_batch(run).text), run.objective.text.eot_id
    assert end == 1 and np.all((text == end) == (np.arange(text.shape[-1]) == text.shape[-1] - 1))
    assert len(np.unique(text)) > 20 and text.max() < run.objective.text.vocab_size
