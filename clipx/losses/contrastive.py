"""Contrastive losses over all pairs of rows of a batch.

Every function returns one value per row; the caller takes the mean. Rows must be unit-normalised.
Inside `jax.set_mesh(...)` the rows are sharded over the batch axes. Without a mesh the same code
runs on one device, and the values agree. Three forms compute the same loss, and none of them holds
the logits of all pairs at once:

    gather: all-gathers one tower. The local rows of the other tower meet it tile by tile. Gradients
      come from autodiff, and the backward pass recomputes each tile.
    assembly: like gather, but with hand-written gradients, which take fewer passes over each tile.
    ring: gathers nothing. One tower travels round the devices, and once more, with its gradients,
      in the backward pass. Memory does not grow with the rows of other devices.

`form=None` lets `pick_form` choose. `info_nce` and `sigmoid` are written once for all forms:
`_gathered` implements "gather", and `clipx.losses.ring` the other two. `nt_xent` and `recall_at_1`
add up or compare in another order when gathered, and have a gathered version of their own.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Int

from clipx.losses import ring
from clipx.losses.forms import Form, pick_form
from clipx.losses.pairwise import (
    NEVER,
    Rows,
    excluded_pairs,
    group_size,
    matches,
    narrow,
    narrow_product,
    product,
    wide,
)
from clipx.losses.reductions import LARGEST, LOG_SUM_EXP, SUM_SOFTPLUS, Reduction
from clipx.losses.tiles import Axes, gather, row_numbers, spread, tiles
from clipx.types import Array, PyTree, Scalar

Scalars = tuple[Array, ...]  # (scale,) or (scale, bias)


def info_nce(
    a: Float[Array, "b d"],
    b: Float[Array, "b d"],
    *,
    scale: Scalar,
    symmetric: bool = True,
    ids: Int[Array, " b"] | None = None,
    groups: int = 1,
    chunk: int | None = None,
    form: Form | None = None,
) -> Float[Array, " b"]:
    """Cross-entropy of each row's match among all rows, in nats: half a→b plus half b→a.

    With the logits L = scale·a·bᵀ, the value of row i is
    ½ (logsumexp L[i, :] - L[i, i]) + ½ (logsumexp L[:, i] - L[i, i]). With `symmetric=False` it is
    logsumexp L[i, :] - L[i, i], the direction a→b alone. The log-sum-exp runs in float32 at least.

    Two rows with equal `ids` are not negatives of each other. With `groups`, a row meets only the
    rows of its own run of b/groups consecutive rows, as on `groups` devices that exchange nothing.
    `chunk` is the number of rows per tile; None picks it.

    Raises `ValueError` if a and b differ in shape, if `groups` or the number of devices does not
    divide the rows, and for an unknown `form`. Source: CLIP (arXiv 2103.00020), figure 3.
    """
    size = group_size(a, b, groups)
    scalars = (jnp.asarray(scale, wide(a)),)

    def finish(a: Array, b: Array, scalars: Scalars) -> Callable:
        match = scalars[0] * matches(a, b)
        if not symmetric:
            return lambda row_lse, _: row_lse - match
        return lambda row_lse, column_lse: 0.5 * (row_lse - match) + 0.5 * (column_lse - match)

    form = pick_form(form, b)
    return _pairwise_loss(
        LOG_SUM_EXP, finish, a, b, ids, scalars, size, columns=symmetric, chunk=chunk, form=form
    )


def sigmoid(
    a: Float[Array, "b d"],
    b: Float[Array, "b d"],
    *,
    scale: Scalar,
    bias: Scalar,
    ids: Int[Array, " b"] | None = None,
    groups: int = 1,
    chunk: int | None = None,
    form: Form | None = None,
) -> Float[Array, " b"]:
    """SigLIP's loss of each row of a, in nats, summed over its pairs with all rows of b.

    With the logits L = scale·a·bᵀ + bias, the value of row i is
    -log σ(L[i, i]) - Σ_{j≠i} log σ(-L[i, j]): the match is the positive, every other pair a
    negative. The mean over rows is the loss of SigLIP (arXiv 2303.15343), algorithm 1. No label
    matrix is built, because softplus(-x) = softplus(x) - x.

    `ids`, `groups`, `chunk`, `form` and the errors are those of `info_nce`.
    """
    size = group_size(a, b, groups)
    scalars = jnp.asarray(scale, wide(a)), jnp.asarray(bias, wide(a))

    def finish(a: Array, b: Array, scalars: Scalars) -> Callable:
        scale, bias = scalars
        return lambda pairs, _: pairs - (scale * matches(a, b) + bias)

    form = pick_form(form, b)
    return _pairwise_loss(
        SUM_SOFTPLUS, finish, a, b, ids, scalars, size, columns=False, chunk=chunk, form=form
    )


def nt_xent(
    a: Float[Array, "b d"],
    b: Float[Array, "b d"],
    *,
    temperature: Scalar = 0.1,
    groups: int = 1,
    chunk: int | None = None,
    form: Form | None = None,
) -> Float[Array, " b"]:
    """SimCLR's NT-Xent of each row's two views, in nats: the mean over both views.

    The positive of a view is the row's other view. Its negatives are both views of every other row,
    so a view never meets itself. Logits are cosines over `temperature`. The mean over rows is the
    loss of SimCLR (arXiv 2002.05709), algorithm 1, and of SLIP.

    `groups`, `chunk`, `form` and the errors are those of `info_nce`.
    """
    size, total = group_size(a, b, groups), a.shape[0]
    scale = jnp.asarray(1 / temperature, wide(a))
    form = pick_form(form, b)
    if form != "gather":  # all views meet all views: rows 2i and 2i + 1 are the views of row i
        views = _rows(jnp.stack([a, b], axis=1).reshape(2 * total, -1), None, True)
        score = _score(a, size and 2 * size, itself=False)
        lse, _ = ring.pairwise_reduce(
            score, LOG_SUM_EXP, views, views, (scale,), chunk=chunk, form=form
        )
        return jnp.mean(lse.reshape(total, 2), axis=1) - scale * matches(a, b)

    def local(axes: Axes, rows: PyTree, scalars: Scalars) -> Array:
        a, b = rows
        all_a, all_b = gather(a, axes), gather(b, axes)
        index = row_numbers(axes, a.shape[0])

        def tile(carry: tuple, rows: PyTree, valid: Array) -> tuple[tuple, Array]:
            a, b, index = rows
            is_itself = index[:, None] == jnp.arange(total)
            excluded = excluded_pairs(index, None, jnp.arange(total), None, size)

            def anchors(x: Array, same: Array, other: Array) -> Array:
                same = jnp.where(is_itself | excluded, NEVER, _logits(x, same, scalars, product))
                other = jnp.where(excluded, NEVER, _logits(x, other, scalars, product))
                lse = jax.nn.logsumexp
                return jnp.logaddexp(lse(same, axis=1), lse(other, axis=1))

            return carry, 0.5 * anchors(a, all_a, all_b) + 0.5 * anchors(b, all_b, all_a)

        _, lse = tiles(tile, (), (a, b, index), chunk, 4 * total, axes)
        return lse - scalars[0] * matches(a, b)

    return spread(local, (a, b), (scale,))


def recall_at_1(
    a: Float[Array, "b d"],
    b: Float[Array, "b d"],
    *,
    groups: int = 1,
    chunk: int | None = None,
    form: Form | None = None,
) -> Float[Array, " b"]:
    """1 for each row of a whose match is nearer than every other row of b, else 0.

    A tie counts as a miss. No gradient flows. `groups`, `chunk`, `form` and the errors are those of
    `info_nce`.
    """
    size, total = group_size(a, b, groups), a.shape[0]
    a, b = lax.stop_gradient(a), lax.stop_gradient(b)
    form = pick_form(form, b)
    if form != "gather":
        score, one = _score(a, size, itself=False), jnp.ones((), wide(a))

        def not_below_match(rows: Rows, visitors: Rows, scalars: Scalars) -> Array:
            constants, match = rows.constants
            scores = score(Rows(rows.values, constants), visitors, scalars)
            return (scores >= match[:, None]).astype(scores.dtype)

        rows, match = _rows(a, None, True), ring.matches(a, b, chunk=chunk)
        rows = rows._replace(constants=(rows.constants, match))
        visitors = _rows(b, None, True)
        beaten, _ = ring.pairwise_reduce(
            not_below_match, LARGEST, rows, visitors, (one,), chunk=chunk, form=form
        )
        return (beaten < 1).astype(beaten.dtype)

    def local(axes: Axes, rows: PyTree, scalars: Scalars) -> Array:
        a, b = rows
        all_b = gather(b, axes)
        index = row_numbers(axes, a.shape[0])

        def tile(carry: tuple, rows: PyTree, valid: Array) -> tuple[tuple, Array]:
            a, index = rows
            scores = product(a, all_b)
            match = jnp.take_along_axis(scores, index[:, None], axis=1)
            beaten = (scores >= match) & (jnp.arange(total) != index[:, None])
            if groups > 1:
                beaten &= ~excluded_pairs(index, None, jnp.arange(total), None, size)
            return carry, 1.0 - jnp.any(beaten, axis=1).astype(scores.dtype)

        return tiles(tile, (), (a, index), chunk, total, axes)[1]

    return spread(local, (a, b), ())


def _logits(a: Array, b: Array, scalars: Scalars, multiply: Callable) -> Array:
    """Logits [c t] of all pairs: scale·a·b, plus the bias if `scalars` has one."""
    scale, *bias = scalars
    logits = scale * multiply(a, b)
    return logits + bias[0] if bias else logits


def _pairwise_loss(
    reduction: Reduction,
    finish: Callable,
    a: Array,
    b: Array,
    ids: Array | None,
    scalars: Scalars,
    size: int | None,
    *,
    columns: bool,
    chunk: int | None,
    form: Form,
) -> Array:
    """A loss that needs one reduction of `_logits` over the pairs of each row.

    `finish(a, b, scalars)` returns a function that maps the reductions of a's rows, and with
    `columns` those of b's rows, to one value per row. It runs on the rows of one device or on those
    of the complete batch.
    """
    masked = ids is not None or size is not None
    if form == "gather":
        return _gathered(reduction, finish, a, b, ids, scalars, size, columns, chunk, masked)
    rows, visitors = _rows(a, ids, masked), _rows(b, ids, masked)
    score = _score(a, size)
    reduced = ring.pairwise_reduce(
        score, reduction, rows, visitors, scalars, chunk=chunk, columns=columns, form=form
    )
    return finish(a, b, scalars)(*reduced)


def _gathered(
    reduction: Reduction,
    finish: Callable,
    a: Array,
    b: Array,
    ids: Array | None,
    scalars: Scalars,
    size: int | None,
    columns: bool,
    chunk: int | None,
    masked: bool,
) -> Array:
    """`_pairwise_loss` in the form "gather"."""
    total, start = a.shape[0], reduction.start

    def local(axes: Axes, rows: PyTree, scalars: Scalars) -> Array:
        a, b, ids = rows
        all_b, all_ids = gather(b, axes), gather(ids, axes)
        index = row_numbers(axes, a.shape[0])

        def tile(carry: PyTree, rows: PyTree, valid: Array) -> tuple[PyTree, Array]:
            a, ids, index = rows
            each = reduction.each(_logits(a, all_b, scalars, product))
            if masked:
                excluded = excluded_pairs(index, ids, jnp.arange(total), all_ids, size)
                each = jnp.where(excluded, start, each)
            if columns:
                column = reduction.of(jnp.where(valid[:, None], each, start), axis=0)
                carry = reduction.join(carry, column)
            return carry, reduction.of(each, axis=1)

        finished, carry = finish(a, b, scalars), ()
        if reduction.share:
            carry = jnp.full(total if columns else 0, start, scalars[0].dtype)
        of_columns, of_rows = tiles(tile, carry, (a, ids, index), chunk, total, axes)
        if axes and columns:  # so far a device has reduced its own rows of every column
            assert reduction.share_differentiably is not None
            of_columns = reduction.share_differentiably(of_columns, axes, index)
        return finished(of_rows, of_columns)

    return spread(local, (a, b, ids), scalars)


def _rows(values: Array, ids: Array | None, masked: bool) -> Rows:
    """`Rows` whose constants are what `excluded_pairs` needs: positions in the batch, and ids."""
    return Rows(values, (jnp.arange(values.shape[0]), ids) if masked else None)


def _score(like: Array, size: int | None, *, itself: bool = True) -> Callable:
    """The score function of `ring.pairwise_reduce` for rows of the dtype of `like`.

    Excluded pairs are `NEVER`. With `itself=False`, so are the pairs of a row with itself.
    """
    dtype = narrow(like)

    def score(rows: Rows, visitors: Rows, scalars: Scalars) -> Array:
        def multiply(a: Array, b: Array) -> Array:
            return narrow_product(a, b, dtype)

        logits = _logits(rows.values, visitors.values, scalars, multiply)
        if rows.constants is None:
            return logits
        (index, ids), (columns, all_ids) = rows.constants, visitors.constants
        excluded = excluded_pairs(index, ids, columns, all_ids, size)
        if not itself:
            excluded |= index[:, None] == columns
        return jnp.where(excluded, NEVER, logits)

    return score
