"""SLIP: its total loss, the gradient with a detached gather, its views, and the laws for groups."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import laws, tiny

from clipx import losses
from clipx.config.binding import bind
from clipx.errors import ConfigError
from clipx.models.heads import BatchNormMLP
from clipx.models.layers import unit
from clipx.objectives.slip import SLIP, Compat, SLIPFeatures

FIELDS = tiny.FIELDS["slip"]
FEATURES = SLIPFeatures(
    *(unit(x) for x in np.random.default_rng(0).normal(size=(2, 8, 6)).astype(np.float32)),
    view=np.random.default_rng(1).normal(size=(8, 5)).astype(np.float32),
    other_view=np.random.default_rng(2).normal(size=(8, 5)).astype(np.float32),
)


def slip(**fields) -> SLIP:
    return SLIP(image=tiny.Linear(), text=tiny.Linear(), **FIELDS | fields)


@pytest.mark.slow  # groups of CLIP and of BatchNorm are tested beside
def test_laws_of_groups():
    laws.check_topology_and_slices("slip:groups=2,ssl_weight=0.5", "float64", 1e-11)


@pytest.fixture(scope="module")
def variables():
    rng = np.random.default_rng(3)

    def init():
        return slip().init(jax.random.key(0), FEATURES, {}, train=True, method="loss")

    shapes = jax.eval_shape(init)
    params = jax.tree.map(lambda x: 0.5 * rng.normal(size=x.shape), shapes["params"])
    stats = jax.tree.map(lambda x: np.ones(x.shape), shapes["batch_stats"])
    return tiny.as_dtype({"params": params, "batch_stats": stats}, "float32")


def step(module, variables, features=FEATURES):
    """The loss and its gradient with respect to parameters and features."""

    def total(params, features):
        loss, _ = module.apply(
            {**variables, "params": params},
            features,
            {},
            train=True,
            method="loss",
            mutable=["batch_stats"],
        )
        return loss.value, loss

    grad = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True, allow_int=True))
    (_, loss), slopes = grad(variables["params"], features)
    return loss, slopes


def test_the_total_is_clips_and_simclrs(variables):
    """The head runs once per view, so each view has its own statistics."""
    module = slip(ssl_weight=0.5, temperature=0.2)
    loss, _ = step(module, variables)
    head = BatchNormMLP((12, 12, 6))
    head_variables = {name: tree["head"] for name, tree in variables.items()}
    views = [
        unit(head.apply(head_variables, x, train=True, mutable="batch_stats")[0])
        for x in (FEATURES.view, FEATURES.other_view)
    ]
    scale = np.exp(variables["params"]["logit_scale"])
    clip = np.mean(losses.info_nce(FEATURES.image, FEATURES.text, scale=scale))
    ssl = np.mean(losses.nt_xent(*views, temperature=0.2))
    np.testing.assert_allclose(loss.metrics["loss/contrastive"], clip, rtol=1e-5)
    np.testing.assert_allclose(loss.metrics["loss/ssl"], ssl, rtol=1e-5)
    np.testing.assert_allclose(loss.value, clip + 0.5 * ssl, rtol=1e-5)
    chance = math.log(8) + 0.5 * math.log(15)
    np.testing.assert_allclose(loss.metrics["chance_loss"], chance)
    assert loss.memory == {}


@pytest.mark.parametrize("ids", [None, np.array([5, 5, 1, 2, 2, 3, 4, 0], np.int32)])
def test_detached_gather_learns_from_queries_alone(variables, ids):
    """The loss value is the same. The gradient of both towers' features is that of plain array code
    in which keys are constants. All other gradients are unchanged."""
    features = FEATURES.replace(ids=ids)
    (attached, (d_params, d_features)), (detached, (p_params, p_features)) = (
        step(slip(compat=Compat(detach_gather)), variables, features)
        for detach_gather in (False, True)
    )
    np.testing.assert_allclose(attached.value, detached.value, rtol=1e-6)
    laws.assert_same(p_params, d_params, 1e-5)

    def plain(image, text):
        def pick(a, b):
            logits = np.exp(variables["params"]["logit_scale"]) * a @ jax.lax.stop_gradient(b).T
            if ids is not None:
                equal = (ids[:, None] == ids) & ~np.eye(8, dtype=bool)
                logits = jnp.where(equal, -jnp.inf, logits)
            return jnp.mean(jax.nn.logsumexp(logits, axis=1) - jnp.diag(logits))

        return (pick(image, text) + pick(text, image)) / 2

    expected = jax.grad(plain, (0, 1))(jnp.asarray(FEATURES.image), jnp.asarray(FEATURES.text))
    laws.assert_same((p_features.image, p_features.text), expected, 1e-5)
    np.testing.assert_allclose(p_features.view, d_features.view, atol=1e-6)
    assert np.abs(d_features.image - p_features.image).max() > 1e-3


def test_views():
    module = SLIP(image=tiny.Linear(), text=tiny.Linear())
    light, *distorted = module.views.pictures
    assert (light.scale, light.flip) == ((0.5, 1.0), False) and light.photometry.jitter == 0
    assert distorted[0] == distorted[1] and distorted[0].scale == (0.08, 1.0)
    assert distorted[0].flip and distorted[0].photometry.jitter == 0.8
    assert module.views.texts == ("caption",)
    other = SLIP(
        image=tiny.Linear(), text=tiny.Linear(), crop_scale=(0.7, 1.0), ssl_crop_scale=(0.3, 0.9)
    )
    assert [view.scale for view in other.views.pictures] == [(0.7, 1.0), *[(0.3, 0.9)] * 2]


def test_published_size():
    """The parameters of the head for ViT-B's 768 features."""
    x = jnp.zeros((2, 768), jnp.float32)
    shapes = jax.eval_shape(BatchNormMLP((4096, 4096, 256)).init, jax.random.key(0), x)["params"]
    count = 769 * 4096 + 2 * 4096 + 4097 * 4096 + 2 * 4096 + 4097 * 256
    assert sum(x.size for x in jax.tree.leaves(shapes)) == count


def test_compat_is_a_section():
    towers = {"image": tiny.Linear(), "text": tiny.Linear()}
    bound = bind(SLIP, {"compat": {"detach_gather": True}}, where="config.objective", **towers)
    assert bound.compat == Compat(detach_gather=True) and not slip().compat.detach_gather
    for fields, where in (
        ({"compat": {"detach": True}}, "compat.detach"),
        ({"ssl_weight": 0.0}, "ssl_weight"),  # would leave the head untrained
        ({"temperature": 0.0}, "temperature"),
        ({"head_width": 0}, "head_width"),
        ({"ssl_augmentation": "slipp"}, "ssl_augmentation"),
    ):
        with pytest.raises(ConfigError) as error:
            bind(SLIP, fields, where="config.objective", **towers)
        assert error.value.where == f"config.objective.{where}"
