"""Critics and discriminators equal the numbers of CLIP-Lite's own code (commit a6825d0).

The parameters, in torch's shapes, are sines of their order and index.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipx import losses
from clipx.errors import ConfigError
from clipx.models.heads import (
    ConcatCritic,
    DotCritic,
    GroupedBatchNorm,
    PriorDiscriminator,
    Projection,
    next_row,
)

X = np.cos(0.37 * np.arange(18)).reshape(3, 6)
T = np.sin(0.53 * np.arange(12)).reshape(3, 4)
TIGHT = {"rtol": 1e-9, "atol": 0}


@pytest.fixture(autouse=True)
def exact():
    with jax.enable_x64(True):
        yield


def block(channels: int, width: int, base: float):
    """(parameters, initial statistics) of one projection."""
    shapes = [(width, channels), (width,), (width,), (width, width), (width,)]
    shapes += [(width, channels), (width,), (width,), (width,)]
    p = [
        (k in (1, 7)) + 0.3 * np.sin(base + 0.7 * k + 0.1 * np.arange(np.prod(s))).reshape(s)
        for k, s in enumerate(shapes)
    ]
    params = {
        "fc": {"kernel": p[0].T},
        "norm": {"scale": p[1], "bias": p[2]},
        "proj": {"kernel": p[3].T, "bias": p[4]},
        "shortcut": {"kernel": p[5].T, "bias": p[6]},
        "ln": {"scale": p[7], "bias": p[8]},
    }
    return params, {"norm": {"mean": np.zeros(width), "var": np.ones(width)}}


def dot_variables():
    (left, left_stats), (right, right_stats) = block(6, 8, 0.0), block(4, 8, 1.0)
    params = {"left": left, "right": right, "logit_scale": np.log(1 / 0.07)}
    return {"params": params, "batch_stats": {"left": left_stats, "right": right_stats}}


def layers(*widths: int) -> list[np.ndarray]:
    """Weights and biases of a perceptron, in torch's shapes."""
    shapes = [s for i, o in zip(widths, widths[1:]) for s in ((o, i), (o,))]
    return [
        0.05 * np.sin(0.3 * k + 0.01 * np.arange(np.prod(s))).reshape(s)
        for k, s in enumerate(shapes)
    ]


def dense(weight, bias):
    return {"kernel": weight.T, "bias": bias}


def test_dot_critic_in_training():
    apply = jax.jit(lambda v: DotCritic(8).apply(v, X, T, train=True, mutable="batch_stats"))
    (positive, negative), changed = apply(dot_variables())
    np.testing.assert_allclose(
        positive, [10.368729180858404, -2.1899139477709437, -6.263680663226968], **TIGHT
    )
    np.testing.assert_allclose(
        negative, [9.587676826123468, -1.6199508601576427, 10.531921666446573], **TIGHT
    )
    loss = jnp.mean(losses.jsd(positive, negative))
    np.testing.assert_allclose(loss, 9.620631065713628, **TIGHT)
    stats = changed["batch_stats"]["left"]["norm"]
    expected = {
        "mean": [0.004720761187203956, -0.018455329487210535],
        "var": [0.8340895785224076, 1.1269508191526287],
    }
    for name, ends in expected.items():
        np.testing.assert_allclose(stats[name][np.array([0, 7])], ends, **TIGHT)


def test_dot_critic_in_evaluation():
    def loss(scale):
        variables = dot_variables()
        variables["params"]["logit_scale"] = scale
        scores = DotCritic(8).apply(variables, X, T)
        return jnp.mean(losses.jsd(*scores)), scores

    (value, scores), grad = jax.jit(jax.value_and_grad(loss, has_aux=True))(math.log(1 / 0.07))
    positive, negative = scores
    np.testing.assert_allclose(
        positive, [10.499946639965176, -9.055886610781622, -11.378380737138544], **TIGHT
    )
    np.testing.assert_allclose(
        negative, [10.69176577391295, 9.242874944172218, 11.069574581473182], **TIGHT
    )
    np.testing.assert_allclose(value, 17.146257808233514, **TIGHT)
    np.testing.assert_allclose(grad, 17.145232174741786, **TIGHT)


def test_prior_discriminator():
    w0, b0, w1, b1, w2, b2 = layers(6, 1000, 200, 1)
    params = {"fc_0": dense(w0, b0), "fc_1": dense(w1, b1), "out": dense(w2, b2)}
    apply = jax.jit(lambda x: PriorDiscriminator().apply({"params": params}, x))
    noise, real = apply(np.arange(18).reshape(3, 6) * 0.11 % 1), apply(X)
    expected = [0.8890406723906314, 0.9313204723737016, 0.9306221287309474]
    np.testing.assert_allclose(jax.nn.sigmoid(noise), expected, **TIGHT)
    expected = [0.9180220166553467, 0.9589486053835748, 0.9186303569280807]
    np.testing.assert_allclose(jax.nn.sigmoid(real), expected, **TIGHT)
    np.testing.assert_allclose(jnp.mean(losses.prior(real, noise)), 2.8212180453879947, **TIGHT)


def test_concat_critic():
    w0, b0, w1, b1, w2, b2 = layers(10, 512, 512, 1)
    params = {
        "left": dense(w0[:, :6], b0),
        "right": {"kernel": w0[:, 6:].T},
        "top": {"fc": dense(w1, b1), "out": dense(w2, b2)},
    }
    critic, variables = ConcatCritic(), {"params": params}
    positive, negative = critic.apply(variables, X, T)
    expected = [-0.2706411792688056, -0.1727022420306412, 0.006268378268428784]
    np.testing.assert_allclose(positive, expected, **TIGHT)
    pairs = critic.apply(variables, X, T[:2], method="pairs")  # sides with different row counts
    np.testing.assert_allclose(np.diag(pairs), positive[:2], rtol=1e-12)
    np.testing.assert_allclose([pairs[0, 1], pairs[2, 0]], negative[np.array([0, 2])], rtol=1e-12)


@pytest.mark.parametrize(
    "module, widths, count",
    [
        (DotCritic(2048), (2048, 768), 19_947_521),
        (DotCritic(2048), (2048, 2048), 25_190_401),
        (DotCritic(2048), (768, 768), 14_704_641),
        (ConcatCritic(), (2048, 768), 1_705_473),
        (Projection(2048), (2048,), 12_595_200),
        (Projection(2048), (768,), 7_352_320),
        (PriorDiscriminator(), (2048,), 2_249_401),
        (PriorDiscriminator(), (768,), 969_401),
    ],
)
def test_published_size(module, widths, count):
    rows = [jnp.zeros((2, width), jnp.float32) for width in widths]
    shapes = jax.eval_shape(module.init, jax.random.key(0), *rows)["params"]
    assert sum(x.size for x in jax.tree.leaves(shapes)) == count


def test_initialisation_is_torchs_and_a_noisy_identity():
    x = jnp.zeros((2, 48), jnp.float32)
    init = jax.jit(DotCritic(96).init)(jax.random.key(0), x, x)["params"]
    assert init["logit_scale"] == np.float32(math.log(1 / 0.07))
    assert not np.array_equal(init["left"]["fc"]["kernel"], init["right"]["fc"]["kernel"])
    block = jax.tree.map(np.asarray, init["left"])
    ends = {("fc", "kernel"): 48, ("proj", "kernel"): 96, ("proj", "bias"): 96}
    for (layer, name), fan_in in (ends | {("shortcut", "bias"): 48}).items():
        value = block[layer][name]
        assert 0.9 < np.abs(value).max() * fan_in**0.5 <= 1
        np.testing.assert_allclose(value.std() * (3 * fan_in) ** 0.5, 1, rtol=0.2)
    shortcut = block["shortcut"]["kernel"]
    np.testing.assert_array_equal(np.diag(shortcut), 1)
    rest = shortcut[~np.eye(*shortcut.shape, dtype=bool)]
    assert 0.0099 < np.abs(rest).max() <= 0.01 and abs(rest.mean()) < 5e-4
    concat = jax.jit(ConcatCritic(64).init)(jax.random.key(0), x, x[:, :16])["params"]
    for value in (concat["left"]["kernel"], concat["right"]["kernel"], concat["left"]["bias"]):
        assert 0.9 < np.abs(value).max() * 64**0.5 <= 1  # fan-in: the channels of both sides


def test_a_projection_narrower_than_its_features_is_a_config_error():
    with pytest.raises(ConfigError, match=r"(?s)config.objective.width.*4, for features of 6"):
        jax.eval_shape(Projection(4).init, jax.random.key(0), X)


def test_next_row():
    rows = np.arange(12).reshape(6, 2)
    np.testing.assert_array_equal(next_row(rows), rows[[1, 2, 3, 4, 5, 0]])
    np.testing.assert_array_equal(next_row(rows, 3), rows[[1, 0, 3, 2, 5, 4]])


def test_groups_normalise_alone_and_keep_the_first_groups_statistics():
    x = np.random.default_rng(0).normal(size=(6, 5))
    params = {"scale": np.arange(1.0, 6), "bias": np.arange(5.0)}
    variables = {
        "params": params,
        "batch_stats": {"mean": np.full(5, 0.5), "var": np.full(5, 2.0)},
    }

    def run(rows, groups):
        norm = GroupedBatchNorm("float64", groups=groups)
        return norm.apply(variables, rows, train=True, mutable="batch_stats")

    found, stats = run(x, 2)
    (first, first_stats), (second, _) = run(x[:3], 1), run(x[3:], 1)
    np.testing.assert_allclose(found, np.concatenate([first, second]), rtol=1e-12)
    jax.tree.map(np.testing.assert_array_equal, stats, first_stats)
    np.testing.assert_array_equal(
        *(GroupedBatchNorm("float64", groups=g).apply(variables, x) for g in (1, 2))
    )


@pytest.mark.parametrize(
    "rows",
    [
        np.ones((1, 6)),
        *(pytest.param(x, marks=pytest.mark.slow) for x in (np.ones((4, 6)), 1e4 * X)),
    ],
)
def test_scores_are_finite_at_any_rows(rows):
    """For one row, equal rows (no variance) and huge rows, at a scale of 100."""
    variables = jax.tree.map(functools.partial(np.asarray, dtype=np.float32), dot_variables())
    variables["params"]["logit_scale"] = np.float32(math.log(100))
    a, b = (np.asarray(x, np.float32) for x in (rows, rows[:, :4]))

    def loss(params):
        v = {**variables, "params": params}
        scores, _ = DotCritic(8).apply(v, a, b, train=True, mutable="batch_stats")
        return jnp.mean(losses.jsd(*scores))

    value, grads = jax.jit(jax.value_and_grad(loss))(variables["params"])
    assert value.dtype == jnp.float32
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((value, grads)))
