"""Which words are masked, and their cross-entropy against a dense twin."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import load_oracle

from clipx import losses
from clipx.data.text.tokenizers import TokenizerConfig
from clipx.parallel.mesh import MeshConfig, make_mesh

ORACLE = load_oracle("declip")
SOT, EOT, MASK = 60, 61, 59
mask = jax.jit(losses.mask_tokens, static_argnames=("vocab_size", "mask_id", "special_ids", "rate"))
OPTIONS = {"vocab_size": 62, "mask_id": MASK, "special_ids": (SOT, EOT, MASK)}


def captions(rows=4000, n=20, words=15):
    """Words of any id except those of marks. 0 is the id of a word and of the padding."""
    ids = np.zeros((rows, n), np.int32)
    ids[:, 1 : words + 1] = np.random.default_rng(0).integers(0, MASK, (rows, words))
    ids[:, 0], ids[:, words + 1] = SOT, EOT
    return ids


def test_statistics_at_a_fixed_key():
    """15 % of the words are selected, and 80/10/10 of these masked, replaced and kept. Marks and
    padding are never selected; random ids cover every id except those of marks."""
    ids, keys = captions(), jax.random.split(jax.random.key(0), 4000)
    corrupted, selected = map(np.asarray, mask(ids, keys, **OPTIONS))
    assert corrupted.dtype == ids.dtype and selected.dtype == bool
    np.testing.assert_array_equal(corrupted[~selected], ids[~selected])
    assert not selected[:, 0].any() and not selected[:, 16:].any()
    assert abs(selected[:, 1:16].mean() - 0.15) < 0.005  # 3.5 standard deviations
    assert np.all(np.abs(selected[:, 1:16].mean(axis=0) - 0.15) < 0.025)
    new, old = corrupted[selected], ids[selected]
    masked, kept = new == MASK, new == old
    assert abs(masked.mean() - 0.8) < 0.015
    # one random id in 59 is the id of the word itself
    assert abs(kept.mean() - 0.1 - 0.1 / 59) < 0.012
    np.testing.assert_array_equal(np.unique(new[~masked & ~kept]), np.arange(MASK))
    assert abs(np.mean(~selected.any(axis=1)) - 0.85**15) < 0.02


def test_the_vocabulary_of_clip_and_marks_in_its_middle():
    """`tokenizer_special`, `text_tiny`: with DeCLIP's ids the first end mark stays where it is.
    Random ids can be below, between and above the special ids."""
    marks = ORACLE["tokenizer_special"]
    ids, keys = np.array(ORACLE["text_tiny"]["ids"]), jax.random.split(jax.random.key(1), 2)
    special = {"mask_id": marks["mask"], "special_ids": (marks["sot"], marks["eot"])}
    out, selected = mask(ids, keys, vocab_size=marks["vocab"], rate=1.0, **special)
    ends = (ids == marks["eot"]).argmax(axis=1)
    np.testing.assert_array_equal((np.asarray(out) == marks["eot"]).argmax(axis=1), ends)
    np.testing.assert_array_equal(selected.sum(axis=1), ends - 1)
    bert = {"vocab_size": 8, "mask_id": 3, "special_ids": (0, 5, 2, 3)}
    out, selected = mask(
        np.array([5, 1, 4, 6, 7] * 99 + [2, 0, 0]), jax.random.key(0), rate=1.0, **bert
    )
    assert set(np.asarray(out)[np.asarray(selected)].tolist()) == {1, 3, 4, 6, 7}
    assert selected.sum() == 4 * 99


def test_without_a_start_mark_and_padded_with_the_end_mark():
    """SigLIP's ids: every word may be selected, also the first, but nothing after the first end
    mark. No random id is that of a mark."""
    ids = TokenizerConfig("sentencepiece", vocab_size=12, context=8, mask=True, marks="end")
    texts = np.array([[3, 4, 5, 1, 1, 1, 1, 1], [1] * 8, [6, 2, 7, 8, 9, 10, 3, 1]])
    options = {"vocab_size": ids.vocab_size, "mask_id": ids.mask_id}
    options |= {"special_ids": ids.special_ids, "rate": 1.0}
    words = (texts > 2).astype(bool)
    seen = set()
    for i in range(60):
        out, selected = map(np.asarray, mask(texts, jax.random.key(i), **options))
        np.testing.assert_array_equal(selected, words)
        np.testing.assert_array_equal(out[~words], texts[~words])
        seen |= set(out[words].tolist())
    assert seen == set(range(3, 12))


def test_a_row_depends_on_its_own_key_alone():
    ids, keys = captions(8), jax.random.split(jax.random.key(0), 8)
    whole = mask(ids, keys, **OPTIONS)
    alone = mask(ids[3], keys[3], **OPTIONS)
    for x, y in zip(whole, alone):
        np.testing.assert_array_equal(x[3], y)
    split = mask(ids, jax.random.key(0), **OPTIONS)  # one key is split
    np.testing.assert_array_equal(whole[0], split[0])


B, N, C, V = 16, 6, 5, 23


def inputs(dtype=np.float64):
    rng = np.random.default_rng(0)
    states, kernel, bias = (rng.normal(size=s) for s in ((B, N, C), (C, V), (V,)))
    targets, selected = rng.integers(0, V, (B, N)), rng.random((B, N)) < 0.3
    selected[3], selected[4] = False, True
    return tuple(np.asarray(x, dtype) for x in (states, kernel, bias)), targets, selected


WEIGHTS = np.random.default_rng(1).normal(size=B)


def dense(states, kernel, bias, targets, selected, chunk=None):
    logits = jax.nn.log_softmax((states @ kernel + bias).astype(jnp.float64))
    match = jnp.take_along_axis(logits, targets[..., None], axis=2)[..., 0]
    return jnp.where(selected, -match, 0).sum(axis=1), selected.sum(axis=1)


@functools.cache
def step(loss, chunk=None):  # compiled once for the tests that share it
    def total(parameters, targets, selected):
        each, count = loss(*parameters, targets, selected, chunk=chunk)
        return jnp.sum(WEIGHTS.astype(each.dtype) * each), (each, count)

    return jax.jit(jax.value_and_grad(total, has_aux=True))


def assert_close(got, expected, atol):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
        np.testing.assert_allclose(x, y, rtol=0, atol=atol)


def test_value_and_gradients_equal_the_dense_twin():
    with jax.enable_x64(True):
        expected = step(dense)(*inputs())
        for shape, chunk in ((None, None), (None, 7), ((8, 1), 2), ((2, 2), 100), ((1, 2), 5)):
            if shape is None:
                got = step(losses.masked_lm, chunk)(*inputs())
            else:
                devices = jax.devices()[: shape[0] * shape[1]]
                with jax.set_mesh(make_mesh(MeshConfig(*shape), devices)):
                    got = step(losses.masked_lm, chunk)(*inputs())
            assert_close(got, expected, 1e-12)
        assert got[0][1][1].dtype == jnp.int32


def test_in_micro_batches_on_a_mesh():
    """Inside a checkpointed scan over slices, as in the training step."""

    def sliced(states, kernel, bias, targets, selected, chunk):
        def embed(carry, rows):
            states, targets, selected = rows
            return carry, losses.masked_lm(states, kernel, bias, targets, selected, chunk=chunk)

        rows = [x.reshape(2, B // 2, *x.shape[1:]) for x in (states, targets, selected)]
        out = jax.lax.scan(jax.checkpoint(embed), (), tuple(map(jnp.asarray, rows)))[1]
        return jax.tree.map(lambda x: x.reshape(B), out)

    with jax.enable_x64(True):
        expected = step(dense)(*inputs())
        with jax.set_mesh(make_mesh(MeshConfig(4, 2), jax.devices())):
            assert_close(step(sliced, 3)(*inputs()), expected, 1e-12)


def test_nothing_selected_is_nothing():
    parameters, targets, selected = inputs(np.float32)
    (value, (each, count)), slopes = step(losses.masked_lm, 4)(
        parameters, targets, selected & False
    )
    assert value == 0 and not each.any() and not count.any() and not any(np.any(x) for x in slopes)


def test_a_row_is_alone():
    """A row's bits do not depend on the words and the selection of other rows."""
    (states, kernel, bias), targets, selected = inputs(np.float32)
    loss = step(losses.masked_lm, 4)
    (_, before), _ = loss((states, kernel, bias), targets, selected)
    # copies: the first call may still be reading these very arrays
    states, targets, selected = (x.copy() for x in (states, targets, selected))
    states[7], targets[7], selected[7] = states[6], targets[6], True
    (_, after), _ = loss((states, kernel, bias), targets, selected)
    for x, y in zip(before, after):
        np.testing.assert_array_equal(np.delete(x, 7), np.delete(y, 7))
        assert x[7] != y[7]


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_bfloat16(scale):
    """For bfloat16 states the value is float32, and each gradient has the dtype of its parameter.
    Results are close to float64 for small logits and finite for large ones."""
    (states, kernel, bias), targets, selected = inputs(np.float32)
    half = jnp.asarray(scale * states, jnp.bfloat16)
    (value, _), slopes = step(losses.masked_lm, 8)((half, kernel, bias), targets, selected)
    assert value.dtype == jnp.float32 and slopes[0].dtype == jnp.bfloat16
    assert slopes[1].dtype == slopes[2].dtype == jnp.float32
    assert jnp.isfinite(value) and all(jnp.all(jnp.isfinite(x)) for x in slopes)
    if scale == 1:
        with jax.enable_x64(True):
            exact = tuple(np.asarray(x, np.float64) for x in (half, kernel, bias))
            (expected, _), twins = step(dense)(exact, targets, selected)
        np.testing.assert_allclose(value, expected, rtol=0.02)
        for x, y in zip(slopes, twins):
            np.testing.assert_allclose(np.float64(x), y, atol=0.03 * np.abs(y).max())
