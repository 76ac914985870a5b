"""FILIP: the authors' numbers, padding, evaluation by tokens, and the laws for its options."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import laws, tiny
from support.declip_oracle import ORACLE, WIDE, sines, unit

from clipx.config.binding import bind
from clipx.errors import ConfigError
from clipx.objectives.filip import FILIP, FILIPFeatures, hide_words
from clipx.parallel.mesh import MeshConfig, make_mesh
from clipx.training.encode import Encode
from clipx.training.step import row_keys
from clipx.types import Encoded


def filip(**fields) -> FILIP:
    towers = {"image": tiny.Linear(embed_dim=8), "text": tiny.Linear(embed_dim=8)}
    return FILIP(**towers, **tiny.FIELDS["filip"] | fields)


@WIDE
def test_the_loss_is_declips(wide):
    """Oracle `dense_logits_filip`."""
    close = {"rtol": 1e-9 if wide else 1e-5}
    with jax.enable_x64(wide):
        image = jnp.asarray(unit(np.cos(5 * sines((2, 5, 4), 0.9)) + sines((2, 5, 4), 2.0)))
        text = jnp.asarray(unit(np.cos(3 * sines((2, 6, 4), 1.0)) + sines((2, 6, 4), 3.0)))
        params = {"late_interaction": {"logit_scale": jnp.asarray(math.log(1 / 0.07))}}
        for mask_padding in (True, False):
            module = filip(top_k=2, contrastive_weight=0.0, mask_padding=mask_padding)
            features = FILIPFeatures(image, text)
            loss = module.apply({"params": params}, features, {}, train=True, method="loss")
            np.testing.assert_allclose(loss.value, ORACLE["dense_logits_filip"]["loss"], **close)
    np.testing.assert_allclose(loss.metrics["logit_scale_dense"], 1 / 0.07, rtol=1e-6)
    assert loss.metrics["chance_loss"] == math.log(2) and loss.memory == {}


@WIDE
def test_evaluation_is_declips(wide):
    """Oracle `filip_eval`: a class's tokens are averaged over prompts, with Frobenius norm 1."""
    prompts = unit(np.cos(3 * sines((2, 2, 3, 4), 0.3)) + sines((2, 2, 3, 4), 1.0)).mean(axis=1)
    classes = prompts / np.linalg.norm(prompts, axis=(1, 2), keepdims=True)
    image = unit(np.cos(5 * sines((2, 5, 4), 0.9)))
    with jax.enable_x64(wide):
        tokens = [Encoded(tokens=jnp.asarray(x)) for x in (image, classes)]
        params = {"late_interaction": {"logit_scale": jnp.float32(1.0)}}
        module = filip(contrastive_weight=0.0)
        scores = module.apply({"params": params}, *tokens, method="similarity")
        np.testing.assert_allclose(
            scores, ORACLE["filip_eval"]["logits"], rtol=1e-9 if wide else 1e-5
        )


@pytest.mark.slow
def test_laws_of_options():
    name = "filip:mask_padding=False,top_k=None,contrast_clean_caption=True,groups=2"
    laws.check_topology_and_slices(name, "float64", 1e-11)
    laws.check_rows("filip:contrastive_weight=0.0")


def captions(rows=6, n=8):
    """Texts of different lengths. Ids after the end mark are 0, as CLIP pads."""
    rng = np.random.default_rng(0)
    ids, lengths = rng.integers(4, 64, (rows, n)), np.array([2, 3, 4, 6, 7, 8])[:rows]
    ids[np.arange(rows), lengths - 1] = 3
    return np.where(np.arange(n) < lengths[:, None], ids, 0).astype(np.int32), lengths


def test_tokens_after_the_end_mark_count_for_nothing():
    """Exactly the tokens after the end mark are 0. Other ids after the end mark, even more end
    marks, change nothing with `mask_padding`, and change the results without it."""
    ids, lengths = captions()
    others = [np.where(np.arange(8) < lengths[:, None], ids, i).astype(np.int32) for i in (7, 3)]
    variables = tiny.variables("filip:top_k=3")
    image = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), np.uint8)
    for mask_padding, same in ((True, True), (False, False)):
        module = filip(mask_padding=mask_padding)

        @jax.jit
        def run(ids, module=module):
            bound = module.bind(variables)
            images, texts = bound.encode_image(image), bound.encode_text(ids)
            features = FILIPFeatures(images.tokens, texts.tokens, images.unit, images.unit)
            late = bound.loss(features, {}, train=True).metrics["loss/late_interaction"]
            return texts.tokens, late, bound.similarity(images, texts)

        tokens, *found = run(ids)
        np.testing.assert_array_equal(
            np.any(tokens != 0, axis=2), (np.arange(8) < lengths[:, None]) | (not mask_padding)
        )
        for other in others:
            _, *moved = run(other)
            assert all(np.array_equal(x, y) == same for x, y in zip(found, moved))


@pytest.mark.parametrize("evaluation", ["image_tokens", "both_tokens", "query_tokens", "global"])
def test_similarity(evaluation):
    """`similarity` through `Encode`, against plain array code over the tokens before padding. Only
    with `query_tokens` it depends on the side that picks."""
    name = f"filip:evaluation={evaluation}"
    module, variables = tiny.objective(name), tiny.variables(name)
    ids, lengths = captions()
    encode = Encode(module, variables, make_mesh(MeshConfig(), jax.devices()[:2]), lambda x: x)
    images = encode.image(np.random.default_rng(1).integers(0, 256, (5, 16, 16, 3), np.uint8))
    texts = encode.text(ids)
    found, of_texts = (encode.similarity(images, texts, query=q) for q in ("image", "text"))
    if evaluation != "query_tokens":
        np.testing.assert_array_equal(of_texts, found)
    if evaluation == "global":
        assert images.tokens is None
        np.testing.assert_allclose(found, images.unit @ texts.unit.T, rtol=1e-5, atol=1e-6)
        return
    assert images.unit is None and images.tokens.shape == (5, 4, 6)
    for i, picture in enumerate(images.tokens):
        for t, length in enumerate(lengths):
            products = picture @ texts.tokens[t, :length].T
            expected, reverse = products.max(axis=1).mean(), products.max(axis=0).mean()
            if evaluation == "both_tokens":
                expected = (expected + reverse) / 2
            np.testing.assert_allclose(found[i, t], expected, rtol=1e-5, atol=1e-6)
            if evaluation == "query_tokens":
                np.testing.assert_allclose(of_texts[i, t], reverse, rtol=1e-5, atol=1e-6)


def test_hidden_words_leave_the_end_where_it_is():
    """Even with most words hidden, the end mark stays where it is and is never added."""
    module, (ids, lengths) = filip(mask_rate=0.9), captions()
    batch = tiny.batch(module, rows=6).replace(text=ids[:, None])
    for step in range(5):
        hidden, selected = hide_words(module, batch, row_keys(0, jnp.int32(step), 6))
        assert np.all((hidden == 3) == (ids == 3)) and np.any(hidden != ids)
        assert not np.any(selected & (np.arange(8) >= lengths[:, None] - 1))


def test_a_weight_of_zero_leaves_the_global_features_out():
    module = filip(contrastive_weight=0.0)
    keys, batch = row_keys(0, jnp.int32(0), 4), tiny.batch(module, rows=4)
    variables = jax.eval_shape(lambda: module.init(jax.random.key(0), batch, keys, {}))
    assert "logit_scale" not in variables["params"]
    features = jax.eval_shape(
        lambda v: module.apply(v, batch, keys, train=True, method="embed"), variables
    )
    assert features.image is features.text is features.ids is None


@pytest.mark.parametrize(
    "fields, where",
    [
        ({"evaluation": "tokens"}, "evaluation"),
        ({"evaluation": "global"}, "evaluation"),  # its projections are untrained
        ({"late_interaction_weight": 0.0, "contrastive_weight": 1.0}, "late_interaction_weight"),
        ({"contrastive_weight": -1.0}, "contrastive_weight"),
        ({"top_k": 0}, "top_k"),
        ({"token_width": 0}, "token_width"),
        ({"mask_rate": 0.0}, "mask_rate"),
        ({"false_negatives": "mask"}, "false_negatives"),
    ],
)
def test_impossible_fields_are_config_errors(fields, where):
    given = {"image": tiny.Linear(), "text": tiny.Linear(), "mask_id": 2, "special_ids": (3, 2)}
    with pytest.raises(ConfigError) as error:
        bind(FILIP, fields, where="config.objective", **given)
    assert error.value.where == f"config.objective.{where}"


def test_hiding_words_needs_a_mask_id():
    with pytest.raises(ConfigError, match=r"(?s)config.tokenizer.mask.*mask=true"):
        filip(mask_id=None)
    assert filip(mask_id=None, contrast_clean_caption=True)
