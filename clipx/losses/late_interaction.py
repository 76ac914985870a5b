"""FILIP's late interaction: images and texts are compared token by token, in tiles."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Bool, Float

from clipx.losses import ring
from clipx.losses.forms import Form, pick_form
from clipx.losses.pairwise import (
    NEVER,
    Rows,
    excluded_pairs,
    group_size,
    narrow,
    narrow_product,
    wide,
)
from clipx.losses.reductions import LOG_SUM_EXP
from clipx.losses.tiles import Axes, gather, row_numbers, spread, tiles
from clipx.losses.token_kernel import ROWS, has_kernel, sum_of_best
from clipx.types import Array, PyTree, Scalar


def _scores(
    a: Array,
    b: Array,
    a_mask: Array | None,
    b_mask: Array | None,
    narrow_to: DTypeLike | None = None,
) -> Array:
    """Scores [i t] of all pairs: the mean over a's tokens of the largest product with a token of b.

    Masked tokens do not count. With `narrow_to` products are `narrow_product`s in that dtype.
    """
    if narrow_to is None:
        highest, out = lax.Precision.HIGHEST, wide(a)
        products = jnp.einsum("ind,tmd->intm", a, b, preferred_element_type=out, precision=highest)
    else:
        (i, n, d), (t, m, _) = a.shape, b.shape
        products = narrow_product(a.reshape(-1, d), b.reshape(-1, d), narrow_to)
        products = products.reshape(i, n, t, m)  # pyright: ignore[reportAttributeAccessIssue]
    if b_mask is not None:
        products = jnp.where(b_mask, products, NEVER)
    best = jnp.max(products, axis=3)
    if a_mask is None:
        return jnp.mean(best, axis=1)
    best = jnp.where(a_mask[:, :, None], best, 0)
    return jnp.sum(best, axis=1) / jnp.maximum(jnp.sum(a_mask, axis=1, keepdims=True), 1)


def _kernel_scores(a: Array, b: Array, a_mask: Array | None, b_mask: Array | None) -> Array:
    """`_scores` by the TPU kernel, which knows no masks: a masked token of a becomes zeros, one of
    b becomes a copy of the first token of its row that counts."""
    count = a.shape[1] if a_mask is None else jnp.maximum(jnp.sum(a_mask, axis=1), 1)[:, None]
    if a_mask is not None:
        a = jnp.where(a_mask[..., None], a, 0)
    if b_mask is not None:
        first = jnp.argmax(b_mask, axis=1)[:, None]
        kept = jnp.where(b_mask, jnp.arange(b.shape[1]), first)
        b = jnp.take_along_axis(b, kept[..., None], axis=1)
    total = sum_of_best(a, b)
    return total / count  # pyright: ignore[reportOperatorIssue]


def _select(
    a: Array, b: Array, a_mask: Array | None, b_mask: Array | None, top_k: int | None
) -> tuple[Array, Array | None]:
    """(tokens, mask) of the `top_k` tokens of each row of a.

    These have the largest sums of products with the tokens of the same row of b. Each sum is
    computed as one product with the sum of b's tokens.
    """
    if top_k is None or top_k >= a.shape[1]:
        return a, a_mask
    b = b.astype(wide(a)) if b_mask is None else jnp.where(b_mask[..., None], b, 0).astype(wide(a))
    score = jnp.sum(
        lax.stop_gradient(a.astype(wide(a)) * jnp.sum(b, axis=1, keepdims=True)), axis=2
    )
    if a_mask is not None:
        score = jnp.where(a_mask, score, NEVER)
    index = lax.top_k(score, top_k)[1]
    kept = jnp.take_along_axis(a, index[..., None], axis=1)
    return kept, None if a_mask is None else jnp.take_along_axis(a_mask, index, axis=1)


def token_similarity(
    a: Float[Array, "i n d"],
    b: Float[Array, "t m d"],
    *,
    a_mask: Bool[Array, "i n"] | None = None,
    b_mask: Bool[Array, "t m"] | None = None,
    chunk: int | None = None,
) -> Float[Array, "i t"]:
    """FILIP's score of every row of a with every row of b, float32 at least.

    For each token of a it takes the largest product with a token of b, and averages these over a's
    tokens. Masks are True where a token counts; each row needs at least one such token. Products of
    tokens exist only for a tile of `chunk` rows of a at a time; None picks the number. Source:
    FILIP (arXiv 2111.07783), section 3.1.
    """

    def tile(carry: tuple, rows: PyTree, valid: Array) -> tuple[tuple, Array]:
        a, a_mask = rows
        return carry, _scores(a, b, a_mask, b_mask)

    return tiles(tile, (), (a, a_mask), chunk, a.shape[1] * b.shape[0] * b.shape[1], ())[1]


def late_interaction(
    a: Float[Array, "b n d"],
    b: Float[Array, "b m d"],
    *,
    scale: Scalar,
    top_k: int | None = 16,
    a_mask: Bool[Array, "b n"] | None = None,
    b_mask: Bool[Array, "b m"] | None = None,
    groups: int = 1,
    chunk: int | None = None,
    form: Form | None = None,
    dtype: DTypeLike | None = None,
) -> Float[Array, " b"]:
    """FILIP's cross-entropy of each row's match among all rows, in nats: half a→b plus half b→a.

    The logits are `scale` (positive) times `token_similarity(a, b)` for a→b and times
    `token_similarity(b, a)` for b→a; the two differ. Tokens must be unit-normalised.

    Every token of a row looks for its best match among `top_k` tokens of each row of the other
    side; None keeps all tokens. A row keeps the tokens that have the largest sums of products with
    the tokens of their own pair. The selection has no gradient; the selected tokens have one.

    Masks are True where a token counts; each row needs at least one such token. Without a mask all
    tokens count, padding included, as in DeCLIP's code (whose published runs may have had `top_k`
    off). `groups`, `chunk`, `form` and the errors are those of `info_nce`.

    In the forms for large batches, "assembly" and "ring", tokens are rounded to `dtype` (None:
    their own); FILIP takes float16 (section 3.1).

    Source: FILIP (arXiv 2111.07783), section 3.1; DeCLIP's code, prototype/model/filip.py.
    """
    size, total = group_size(a[:, 0], b[:, 0], groups), a.shape[0]
    scale = jnp.asarray(scale, wide(a))
    form = pick_form(form, a if a.size > b.size else b)
    if form != "gather":
        kept = _select(b, a, b_mask, a_mask, top_k), _select(a, b, a_mask, b_mask, top_k)
        sides = [
            (x.astype(dtype or x.dtype), mask) for x, mask in ((a, a_mask), (b, b_mask), *kept)
        ]
        return sum(  # pyright: ignore[reportReturnType]
            0.5 * _ring_half(*x, *y, scale, size, chunk, form) for x, y in zip(sides[:2], sides[2:])
        )

    def local(axes: Axes, rows: PyTree, scalars: tuple) -> Array:
        a, b, a_mask, b_mask = rows
        (scale,) = scalars
        index = row_numbers(axes, a.shape[0])

        def toward(x: Array, x_mask: Array | None, y: Array, y_mask: Array | None) -> Array:
            y, y_mask = gather(y, axes), gather(y_mask, axes)

            def tile(carry: tuple, rows: PyTree, valid: Array) -> tuple[tuple, Array]:
                x, x_mask, index = rows
                logits = scale * _scores(x, y, x_mask, y_mask)
                if groups > 1:
                    excluded = excluded_pairs(index, None, jnp.arange(total), None, size)
                    logits = jnp.where(excluded, NEVER, logits)
                match = jnp.take_along_axis(logits, index[:, None], axis=1)[:, 0]
                return carry, jax.nn.logsumexp(logits, axis=1) - match

            products = x.shape[1] * y.shape[0] * y.shape[1]  # of one row
            return tiles(tile, (), (x, x_mask, index), chunk, products, axes)[1]

        a_kept = _select(a, b, a_mask, b_mask, top_k)
        b_kept = _select(b, a, b_mask, a_mask, top_k)
        return 0.5 * toward(a, a_mask, *b_kept) + 0.5 * toward(b, b_mask, *a_kept)

    return spread(local, (a, b, a_mask, b_mask), (scale,))


def _ring_half(
    x: Array,
    x_mask: Array | None,
    y: Array,
    y_mask: Array | None,
    scale: Array,
    size: int | None,
    chunk: int | None,
    form: Literal["assembly", "ring"],
) -> Array:
    """The loss x→y without a gather: the rows of x stay, the kept tokens of y are the visitors."""
    dtype, kernel = narrow(x), has_kernel(x, y)
    index = None if size is None else jnp.arange(x.shape[0])

    def score(rows: Rows, visitors: Rows, scalars: tuple) -> Array:
        (index, x_mask), (columns, y_mask) = rows.constants, visitors.constants
        if kernel:
            logits = scalars[0] * _kernel_scores(rows.values, visitors.values, x_mask, y_mask)
        else:
            logits = scalars[0] * _scores(rows.values, visitors.values, x_mask, y_mask, dtype)
        if size is None:
            return logits
        return jnp.where(excluded_pairs(index, None, columns, None, size), NEVER, logits)

    rows, visitors = Rows(x, (index, x_mask)), Rows(y, (index, y_mask))
    elements = x.shape[1] * y.shape[1]
    lse, _ = ring.pairwise_reduce(
        score,
        LOG_SUM_EXP,
        rows,
        visitors,
        (scale,),
        chunk=min(chunk or ROWS, ROWS) if kernel else chunk,
        elements=elements,
        form=form,
    )

    def match_scores(axes: Axes, rows: PyTree, scalars: tuple) -> Array:
        def pair(row: PyTree) -> Array:
            return _scores(*jax.tree.map(lambda x: x[None], row))[0, 0]

        def tile(carry: tuple, rows: PyTree, valid: Array) -> tuple[tuple, Array]:
            return carry, jax.vmap(pair)(rows)

        return tiles(tile, (), rows, chunk, elements, axes)[1]

    return lse - scale * spread(match_scores, (x, y, x_mask, y_mask), ())
