"""FILIP's loss equals the reference's numbers, and a dense twin on every mesh."""

import functools
import importlib
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import load_oracle

from clipx import losses
from clipx.losses.token_kernel import sum_of_best
from clipx.parallel.mesh import MeshConfig, make_mesh

ORACLE = load_oracle("declip")
late_interaction = importlib.import_module("clipx.losses.late_interaction")


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def sines(shape, phase, scale=1.0):
    """The function S of the oracle."""
    return (scale * np.sin(phase + 0.7 * np.arange(np.prod(shape)))).reshape(shape)


similarity = jax.jit(losses.token_similarity, static_argnames="chunk")


@pytest.mark.parametrize("wide", [True, False], ids=["float64", "float32"])
def test_late_interaction_is_declips(wide):
    """The loss, and both logits for the tokens that the reference kept. The oracle has the same
    function twice, as `dense_logits_filip` and `dense_logits_defilip`."""
    oracle, close = ORACLE["dense_logits_filip"], {"rtol": 1e-9 if wide else 1e-5}
    assert oracle == ORACLE["dense_logits_defilip"]
    with jax.enable_x64(wide):
        image = unit(np.cos(5 * sines((2, 5, 4), 0.9)) + sines((2, 5, 4), 2.0))
        text = unit(np.cos(3 * sines((2, 6, 4), 1.0)) + sines((2, 6, 4), 3.0))
        image, text, scale = jnp.asarray(image), jnp.asarray(text), 1 / 0.07
        loss = jax.jit(losses.late_interaction, static_argnames="top_k")
        got = loss(image, text, scale=scale, top_k=2)
        np.testing.assert_allclose(got.mean(), oracle["loss"], **close)
        for a, b, side, kept in (
            (image, text, "logits_per_image", "txt_selected"),
            (text, image, "logits_per_text", "img_selected"),
        ):
            kept = np.take_along_axis(np.asarray(b), np.array(oracle[kept])[..., None], axis=1)
            got = scale * similarity(a, kept)
            np.testing.assert_allclose(got, oracle[side], **close)


@pytest.mark.parametrize("wide", [True, False], ids=["float64", "float32"])
def test_token_similarity_is_filips_evaluation(wide):
    """`filip_eval`: a class is the matrix of its prompts' mean tokens, with Frobenius norm 1."""
    prompts = unit(np.cos(3 * sines((2, 2, 3, 4), 0.3)) + sines((2, 2, 3, 4), 1.0)).mean(axis=1)
    classes = prompts / np.linalg.norm(prompts, axis=(1, 2), keepdims=True)
    with jax.enable_x64(wide):
        image = jnp.asarray(unit(np.cos(5 * sines((2, 5, 4), 0.9))))
        for chunk in (None, 1):
            got = similarity(image, jnp.asarray(classes), chunk=chunk)
            tolerance = 1e-9 if wide else 1e-5
            np.testing.assert_allclose(got, ORACLE["filip_eval"]["logits"], rtol=tolerance)


B, N, M = 16, 5, 7
A_MASK = np.arange(N) < np.random.default_rng(2).integers(1, N + 1, (B, 1))
B_MASK = np.arange(M) < np.random.default_rng(3).integers(1, M + 1, (B, 1))


def tokens(dtype=np.float64):
    rng = np.random.default_rng(0)
    return [unit(rng.normal(size=(B, n, 6))).astype(dtype) for n in (N, M)]


def dense(a, b, scale, top_k, a_mask=None, b_mask=None, groups=1):
    """The loss in plain array code, which holds the token products of all pairs at once."""
    a_mask = np.ones((B, N), bool) if a_mask is None else a_mask
    b_mask = np.ones((B, M), bool) if b_mask is None else b_mask

    def half(x, y, x_mask, y_mask):
        own = jnp.where(x_mask[:, None], jnp.einsum("bmd,bnd->bmn", y, x), 0).sum(axis=2)
        order = jnp.argsort(-jnp.where(y_mask, own, -jnp.inf), axis=1)[:, :top_k]
        kept = jnp.zeros(y_mask.shape, bool).at[jnp.arange(B)[:, None], order].set(True) & y_mask
        products = jnp.where(kept, jnp.einsum("ind,tmd->intm", x, y), -jnp.inf)
        best = jnp.where(x_mask[..., None], products.max(axis=3), 0).sum(axis=1)
        logits = scale * best / x_mask.sum(axis=1, keepdims=True)
        place = np.arange(B) // (B // groups)
        seen = jnp.where(place[:, None] == place, logits, -jnp.inf)
        return jax.nn.logsumexp(seen, axis=1) - jnp.diag(logits)

    return 0.5 * half(a, b, a_mask, b_mask) + 0.5 * half(b, a, b_mask, a_mask)


MASKS = {"a_mask": A_MASK, "b_mask": B_MASK}
CASES = [  # options of the loss; meshes and tile sizes, some with "ring" beside "gather"
    ({"top_k": 2}, [(None, 3), ((8, 1), 1), ((2, 2), 3, "ring")]),
    ({"top_k": None}, [((8, 1), None)]),
    ({"top_k": 3, **MASKS}, [(None, 5), ((4, 2), None, "ring")]),
    ({"top_k": 2, "b_mask": B_MASK, "groups": 2}, [(None, 3, "ring"), ((8, 1), None)]),
]


@pytest.mark.parametrize("options, layouts", CASES, ids=["top_k", "all", "masks", "groups"])
def test_value_and_gradients_equal_the_dense_twin(options, layouts):
    weights = np.random.default_rng(1).normal(size=B)

    def grads(loss, **more):
        def total(a, b, scale):
            return jnp.sum(weights * loss(a, b, scale=scale, **options, **more))

        return jax.jit(jax.value_and_grad(total, (0, 1, 2)))(*tokens(), 14.0)

    with jax.enable_x64(True):
        expected = grads(dense)
        for shape, chunk, form in [
            (shape, chunk, form) for shape, chunk, *other in layouts for form in ("gather", *other)
        ]:
            devices = jax.devices()[: np.prod(shape or 1)]
            with jax.set_mesh(make_mesh(MeshConfig(*shape or (1,)), devices)):
                got = grads(losses.late_interaction, chunk=chunk, form=form)
            for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
                np.testing.assert_allclose(x, y, rtol=0, atol=1e-12, err_msg=f"{shape} {chunk}")


def test_what_is_masked_does_not_matter():
    """Not even if a text has fewer unmasked tokens than `top_k`."""
    (a, b), (other, _) = tokens(np.float32), (x[::-1] for x in tokens(np.float32))
    changed = np.where(A_MASK[..., None], a, other), np.where(B_MASK[..., None], b, b[::-1])
    assert np.any(B_MASK.sum(axis=1) < 4)
    loss = jax.jit(lambda a, b: losses.late_interaction(a, b, scale=9.0, top_k=4, **MASKS))
    np.testing.assert_array_equal(loss(a, b), loss(*changed))


def test_finite_in_bfloat16_at_scale_100():
    """For distinct rows, identical rows, and identical tokens, with one row per device."""
    a, b = (jnp.asarray(x[:8], jnp.bfloat16) for x in tokens())
    same = [jnp.broadcast_to(x[:1], x.shape) for x in (a, b)]
    one = [jnp.broadcast_to(x[:1, :1], x.shape) for x in (a, b)]

    @jax.jit
    def step(a, b, a_mask, b_mask):
        def mean(a, b):
            masks = {"a_mask": a_mask, "b_mask": b_mask}
            return losses.late_interaction(a, b, scale=100.0, top_k=3, **masks).mean()

        return jax.value_and_grad(mean, (0, 1))(a, b)

    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices())):
        for pair in ((a, b), same, one):
            value, slopes = step(*pair, A_MASK[:8], B_MASK[:8])
            assert value.dtype == jnp.float32 and jnp.isfinite(value)
            assert all(jnp.all(jnp.isfinite(x)) for x in slopes)


def test_rows_must_belong_together():
    a, b = tokens(np.float32)
    unchecked = inspect.unwrap(losses.late_interaction)  # else the tests' own check is first
    with pytest.raises(ValueError, match="differ in shape"):
        unchecked(a[1:], b, scale=1.0)
    with pytest.raises(ValueError, match="groups=3"):
        unchecked(a, b, scale=1.0, groups=3)


def test_a_large_batch_is_multiplied_in_the_given_dtype():
    """The form "ring" rounds tokens to `dtype`; a small batch's form keeps them as they are."""
    a, b = map(jnp.asarray, tokens(np.float32))
    loss = functools.partial(losses.late_interaction, scale=9.0, top_k=2)
    rounded = [x.astype(jnp.bfloat16) for x in (a, b)]
    ring = loss(a, b, form="ring", dtype="bfloat16")
    np.testing.assert_array_equal(ring, loss(*rounded, form="ring"))
    assert np.any(ring != loss(a, b, form="ring"))
    np.testing.assert_array_equal(loss(a, b, dtype="bfloat16"), loss(a, b))


@pytest.mark.parametrize("rows, tokens", [((32, 16), (7, 5)), ((256, 16), (18, 2))])
def test_the_tpu_kernel(rows, tokens):
    """Its sums of best products, and their gradients, against autodiff of the plain formula. The
    second shape takes two blocks of rows and two of tokens."""
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.normal(size=(r, n, 8)), jnp.bfloat16) for r, n in zip(rows, tokens))
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    slopes = jnp.asarray(rng.normal(size=rows), jnp.bfloat16).astype(jnp.float32)

    def plain(a, b):
        return jnp.einsum("ind,tmd->intm", a, b, precision="highest").max(axis=3).sum(axis=1)

    def both(f):
        values, pull = jax.vjp(f, a, b)
        return values, *pull(slopes)

    for got, expected in zip(both(lambda a, b: sum_of_best(a, b, True)), both(plain)):
        np.testing.assert_allclose(got, expected, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("masks", [(A_MASK, None), (None, B_MASK)], ids=["a", "b"])
def test_masks_for_the_tpu_kernel(masks, monkeypatch):
    """It has none of its own: masked scores and gradients are those of the plain formula."""
    kernel = functools.partial(sum_of_best, interpret=True)
    monkeypatch.setattr(late_interaction, "sum_of_best", lambda a, b: kernel(a, b))
    masks = [None if mask is None else jnp.asarray(mask) for mask in masks]
    rng = np.random.default_rng(1)
    a, b = (jnp.asarray(rng.normal(size=(B, n, 8)), jnp.bfloat16) for n in (N, M))
    slopes = jnp.asarray(rng.normal(size=(B, B)), jnp.bfloat16).astype(jnp.float32)

    def both(f):
        wide = a.astype(jnp.float32), b.astype(jnp.float32)
        values, pull = jax.vjp(lambda a, b: f(a, b, *masks), *wide)
        return values, *pull(slopes)

    scores = both(late_interaction._kernel_scores), both(late_interaction._scores)
    for got, expected in zip(*scores):  # a slope over a count is rounded to bfloat16
        np.testing.assert_allclose(got, expected, atol=4e-3 * np.abs(expected).max())
