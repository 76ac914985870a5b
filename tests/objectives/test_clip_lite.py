"""CLIP-Lite: its total loss, its modes, and the laws for each mode."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import laws, tiny

from clipx.config.binding import bind
from clipx.errors import ConfigError
from clipx.objectives.clip_lite import CLIPLite, CLIPLiteFeatures
from clipx.training.step import row_keys
from clipx.types import Encoded

LN2 = math.log(2)
VARIANTS = [  # beside the default, which tests/laws covers
    "critic=concat,image_terms=True,prior=adversarial,false_negatives=mask",
    "critic=condot,text_terms=True,prior=off",
    "critic=dotcon,image_terms=True,groups=2",
]
ROWS, WIDTH = 8, 6
_rng = np.random.default_rng(0)
FEATURES = CLIPLiteFeatures(
    *_rng.normal(size=(4, ROWS, WIDTH)).astype(np.float32),
    prior=_rng.uniform(1, 3, ROWS).astype(np.float32),
)


@pytest.mark.slow  # the laws hold the default
def test_laws_of_another_critic_and_prior():
    name = f"clip_lite:augmentation=none,{VARIANTS[0]}"
    laws.check_rows(name)
    laws.check_edge(name)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_laws_of_every_critic_and_prior(variant):
    name = f"clip_lite:augmentation=none,{variant}"
    laws.check_topology_and_slices(name, "float64", 1e-11)
    laws.check_rows(name)


def lite(**fields) -> CLIPLite:
    return CLIPLite(image=tiny.Linear(), text=tiny.Linear(), **{"width": WIDTH} | fields)


@functools.cache
def variables(module: CLIPLite):
    """Random variables of the heads alone; nothing is compiled."""
    rng = np.random.default_rng(1)
    features = features_of(module)

    def loss(features):
        return module.init(jax.random.key(0), features, {}, train=True, method="loss")

    shapes = jax.eval_shape(loss, features)
    params = jax.tree.map(lambda x: 0.5 * rng.normal(size=x.shape), shapes["params"])
    stats = jax.tree.map(lambda x: 1 + rng.uniform(size=x.shape), shapes.get("batch_stats", {}))
    return tiny.as_dtype({"params": params, "batch_stats": stats}, "float32")


def features_of(module: CLIPLite, features=FEATURES):
    return features.replace(
        other_image=features.other_image if module.image_terms else None,
        other_text=features.other_text if module.text_terms else None,
        prior=None if module.prior == "off" else features.prior,
    )


def loss(module, features=FEATURES):
    """The metrics of the loss, and the running statistics after it."""
    out, changed = jax.jit(
        lambda features: module.apply(
            variables(module), features, {}, train=True, method="loss", mutable="batch_stats"
        )
    )(features_of(module, features))
    assert out.memory == {}
    return {k: float(v) for k, v in out.metrics.items()}, changed.get("batch_stats", {})


def test_the_total_is_weighted_as_the_authors_code_weights_it():
    full, _ = loss(lite(image_terms=True, text_terms=True, prior_weight=0.3))
    terms = full["loss/cross_modal"] + full["loss/image"] + full["loss/text"]
    np.testing.assert_allclose(full["loss/prior"], FEATURES.prior.mean(), rtol=1e-6)
    np.testing.assert_allclose(full["loss"], 0.7 * terms + 0.3 * full["loss/prior"], rtol=1e-6)
    np.testing.assert_allclose(full["chance_loss"], 2 * LN2 * (0.7 * 3 + 0.3 * 2))
    plain, _ = loss(lite(prior="off"))
    np.testing.assert_allclose(plain["loss"], 0.9 * plain["loss/cross_modal"], rtol=1e-6)
    np.testing.assert_allclose(plain["chance_loss"], 0.9 * 2 * LN2)
    assert not {"loss/prior", "loss/image", "loss/text"} & set(plain)


@pytest.mark.parametrize("critic", ["dot", "concat"])
def test_chance_is_the_loss_of_a_critic_that_knows_nothing(critic):
    """All scores are 0, and both discriminators say 1/2."""
    module = lite(critic=critic)
    params = jax.tree.map(np.array, variables(module)["params"])
    head = params["image_text"]
    if critic == "dot":
        head["logit_scale"] = -np.inf
    else:
        head["top"]["out"] = jax.tree.map(np.zeros_like, head["top"]["out"])
    features = features_of(module).replace(prior=np.full(ROWS, 4 * LN2, np.float32))
    out, _ = module.apply(
        {**variables(module), "params": params},
        features,
        {},
        train=True,
        method="loss",
        mutable="batch_stats",
    )
    np.testing.assert_allclose(out.value, out.metrics["chance_loss"], rtol=1e-6)
    assert out.metrics["batch/accuracy"] == 0  # a tie is a miss


def test_groups_are_batches_of_their_own():
    """With two groups, the loss is the mean of the groups' losses, and the running statistics are
    those of the first group."""
    halves = [jax.tree.map(lambda x, i=i: x[i : i + 4], FEATURES) for i in (0, 4)]
    both, stats = loss(lite(groups=2))
    (first, first_stats), (second, _) = (loss(lite(), half) for half in halves)
    for name in ("loss", "loss/cross_modal", "batch/accuracy"):
        np.testing.assert_allclose(both[name], (first[name] + second[name]) / 2, rtol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), stats, first_stats)
    assert not np.isclose(both["loss"], loss(lite())[0]["loss"], rtol=1e-3)


def test_groups_that_do_not_divide_the_batch_are_a_config_error():
    with pytest.raises(ConfigError, match=r"(?s)config.objective.groups.*3, with 8 rows"):
        loss(lite(groups=3))


def test_a_negative_with_the_rows_own_caption_counts_nothing():
    module = lite(critic="concat", prior="off", false_negatives="mask")
    ids = np.array([5, 5, 1, 2, 2, 3, 4, 0], np.int32)  # rows 0 and 3 meet their own caption
    masked, _ = loss(module, FEATURES.replace(ids=ids))
    positive, negative = module.bind(variables(module)).image_text(FEATURES.image, FEATURES.text)
    wrong = np.delete(np.asarray(jax.nn.softplus(negative)), [0, 3])
    expected = np.mean(jax.nn.softplus(-positive)) + wrong.mean()
    np.testing.assert_allclose(masked["loss/cross_modal"], expected, rtol=1e-6)
    same, _ = loss(module, FEATURES.replace(ids=np.zeros(ROWS, np.int32)))
    np.testing.assert_allclose(
        same["loss/cross_modal"], np.mean(jax.nn.softplus(-positive)), rtol=1e-6
    )


@functools.cache
def prior_gradients(mode: str):
    """The mean prior term, and its gradient for both towers and both discriminators."""
    name = f"clip_lite:augmentation=none,prior={mode}"
    module, state = tiny.objective(name), tiny.variables("clip_lite:augmentation=none")
    batch, keys = tiny.batch(module, rows=4), row_keys(0, jnp.int32(5), 4)

    def total(params):
        features = module.apply(
            {**state, "params": params}, batch, keys, train=True, method="embed"
        )
        return features.prior.mean()

    value, grads = jax.jit(jax.value_and_grad(total))(state["params"])
    return jax.tree.map(np.asarray, (value, grads))


def test_the_adversarial_prior_reverses_only_the_gradient_of_the_towers():
    (value, grads), (other, turned) = map(prior_gradients, ("cooperative", "adversarial"))
    assert value == other
    for name in ("image_prior", "text_prior"):
        jax.tree.map(np.testing.assert_array_equal, grads[name], turned[name])
    for name in ("image", "text"):
        assert np.abs(grads[name]["fc"]["kernel"]).max() > 0
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, -b), grads[name], turned[name])


def test_the_priors_noise_is_each_rows_own_and_new_at_each_step():
    """Without dropout, keys change only the noise."""
    module = tiny.objective("clip_lite:augmentation=none", dropout=0.0)
    state = tiny.variables("clip_lite:augmentation=none")
    batch = jax.tree.map(lambda x: np.repeat(x[:1], 4, axis=0), tiny.batch(module))
    priors = [
        module.apply(
            state, batch, row_keys(0, jnp.int32(step), 4), train=True, method="embed"
        ).prior
        for step in (0, 1)
    ]
    assert len(np.unique(priors)) == 8


@pytest.mark.parametrize("critic", ["dot", "concat"])
def test_similarity_is_the_critics(critic):
    """`similarity` scores every image with every text as the critic does, up to its scale."""
    module = tiny.objective(f"clip_lite:augmentation=none,critic={critic}")
    state, batch = (
        tiny.variables(f"clip_lite:augmentation=none,critic={critic}"),
        tiny.batch(module),
    )

    @jax.jit
    def run(image, text):
        bound = module.bind(state)
        images, texts = bound.encode_image(image), bound.encode_text(text)
        kept = [
            Encoded(**{name: getattr(x, name) for name in module.compares}) for x in (images, texts)
        ]
        towers = bound.image(image_of(bound, image)).raw, bound.text(text).raw
        return bound.similarity(*kept), bound.image_text(*towers), images

    def image_of(bound, image):
        return (image / 255.0 - jnp.array(bound.mean)) / jnp.array(bound.std)

    scores, (positive, negative), images = run(batch.image[:5, 0], batch.text[:5, 0])
    if critic == "dot":
        scores = scores * np.exp(state["params"]["image_text"]["logit_scale"])
        assert images.unit.shape == images.raw.shape == (5, 12)
        np.testing.assert_allclose(np.linalg.norm(images.unit, axis=1), 1, rtol=1e-5)
    rows = np.arange(5)
    np.testing.assert_allclose(scores[rows, rows], positive, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(scores[rows, (rows + 1) % 5], negative, rtol=1e-4, atol=1e-4)


def test_views_are_what_the_terms_need():
    one, both = lite(), lite(image_terms=True, text_terms=True)
    assert (len(one.views.pictures), one.views.texts) == (1, ("caption",))
    assert (len(both.views.pictures), both.views.texts) == (2, ("caption", "other"))
    assert both.views.pictures[0] == both.views.pictures[1] == one.views.pictures[0]
    assert one.views.pictures[0].scale == (0.2, 1.0) and not one.views.pictures[0].flip


@pytest.mark.parametrize(
    "fields, where",
    [
        ({"critic": "dots"}, "critic"),
        ({"prior": "adversary"}, "prior"),
        ({"prior_weight": 1.0}, "prior_weight"),
        ({"prior_weight": 0.0}, "prior_weight"),  # would leave the discriminators untrained
        ({"width": 0}, "width"),
        ({"groups": 0}, "groups"),
    ],
)
def test_impossible_fields_are_config_errors(fields, where):
    towers = {"image": tiny.Linear(), "text": tiny.Linear()}
    with pytest.raises(ConfigError) as error:
        bind(CLIPLite, fields, where="config.objective", **towers)
    assert error.value.where == f"config.objective.{where}"
    assert bind(CLIPLite, {"prior": "off", "prior_weight": 0.0}, **towers).prior_weight == 0


def test_published_size():
    """The critic and both discriminators, for features of ResNet-50 and BERT, have 31 tensors."""
    batch, keys = tiny.batch(lite(), rows=2), row_keys(0, jnp.int32(0), 2)

    def init():
        module = CLIPLite(image=tiny.Linear(embed_dim=2048), text=tiny.Linear(embed_dim=768))
        return module.init(jax.random.key(0), batch, keys, {})["params"]

    params = jax.eval_shape(init)
    heads = jax.tree.leaves({k: v for k, v in params.items() if k not in ("image", "text")})
    assert len(heads) == 31
    assert sum(x.size for x in heads) == 23_166_323
