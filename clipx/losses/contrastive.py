"""Losses in which every row meets every other row.

Each returns a value per row; the mean is the caller's. Rows come unit-normalised. Called inside
`jax.set_mesh(...)`, rows are spread over the batch axes; without a mesh the same code runs on one
device, and the numbers agree. Three forms compute the same, and none holds a b x B block:

    gather: one tower is gathered, and the rows of the other meet it tile by tile. Gradients are
      autodiff's; the backward pass computes each tile anew.
    assembly: the same with gradients written by hand: fewer passes over each tile.
    ring: nothing is gathered. One tower travels round the devices, in the backward pass once more
      with its gradients. Memory does not grow with the rows of other devices.

`form=None` chooses by `pick_form`. A loss is written once: its logits, its exclusions and what it
makes of the reduced numbers serve all forms, of which `_gathered` is the first and
`clipx.losses.ring` the others.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

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
from clipx.losses.tiles import gather, row_numbers, spread, tiles


def info_nce(
    a: Float[Array, "b d"],
    b: Float[Array, "b d"],
    *,
    scale: Float[Array, ""] | float,
    symmetric: bool = True,
    ids: Int[Array, " b"] | None = None,
    groups: int = 1,
    chunk: int | None = None,
    form: Form | None = None,
) -> Float[Array, " b"]:
    """Cross-entropy of each row's match among all rows, in nats: half a→b and half b→a.

    With `symmetric=False` a→b alone. Pairs with equal `ids` are no negatives of each other. Rows
    meet only within their run of B/groups rows, as on `groups` devices that share nothing.
    `chunk` is the number of rows a tile holds; None picks it. Source: CLIP (arXiv 2103.00020),
    figure 3; the log-sum-exp runs in float32 for any input.
    """
    size = group_size(a, b, groups)
    scalars = (jnp.asarray(scale, wide(a)),)

    def finish(a, b, scalars):
        match = scalars[0] * matches(a, b)
        if not symmetric:
            return lambda row_lse, _: row_lse - match
        return lambda row_lse, column_lse: 0.5 * (row_lse - match) + 0.5 * (column_lse - match)

    options = {"size": size, "columns": symmetric, "chunk": chunk, "form": pick_form(form, b)}
    return _pairwise_loss(LOG_SUM_EXP, finish, a, b, ids, scalars, **options)


def sigmoid(
    a: Float[Array, "b d"],
    b: Float[Array, "b d"],
    *,
    scale: Float[Array, ""] | float,
    bias: Float[Array, ""] | float,
    ids: Int[Array, " b"] | None = None,
    groups: int = 1,
    chunk: int | None = None,
    form: Form | None = None,
) -> Float[Array, " b"]:
    """SigLIP's loss of each row of a, in nats, summed over its pairs with all rows of b.

    The match is a positive, every other pair a negative: -log σ(±(scale·a·b + bias)); their mean
    over rows is the loss of arXiv 2303.15343, algorithm 1. No label matrix is built, since
    softplus(-x) = softplus(x) - x. `ids`, `groups` and `chunk` as in `info_nce`.
    """
    size = group_size(a, b, groups)
    scalars = jnp.asarray(scale, wide(a)), jnp.asarray(bias, wide(a))

    def finish(a, b, scalars):
        scale, bias = scalars
        return lambda pairs, _: pairs - (scale * matches(a, b) + bias)

    options = {"size": size, "columns": False, "chunk": chunk, "form": pick_form(form, b)}
    return _pairwise_loss(SUM_SOFTPLUS, finish, a, b, ids, scalars, **options)


def nt_xent(
    a: Float[Array, "b d"],
    b: Float[Array, "b d"],
    *,
    temperature: float = 0.1,
    groups: int = 1,
    chunk: int | None = None,
    form: Form | None = None,
) -> Float[Array, " b"]:
    """SimCLR's cross-entropy of each row's two views, in nats, the mean over both.

    A view's match is the row's other view; its negatives are both views of every other row, so a
    view never meets itself. The mean over rows is the loss of arXiv 2002.05709, algorithm 1, and of
    SLIP. `groups` and `chunk` as in `info_nce`.
    """
    size, total = group_size(a, b, groups), a.shape[0]
    scale = jnp.asarray(1 / temperature, wide(a))
    form = pick_form(form, b)
    if form != "gather":  # all views meet all views: rows 2i and 2i + 1 are row i's
        views = _rows(jnp.stack([a, b], axis=1).reshape(2 * total, -1), None, True)
        score = _score(a, size and 2 * size, itself=False)
        options = {"chunk": chunk, "form": form}
        lse, _ = ring.pairwise_reduce(score, LOG_SUM_EXP, views, views, (scale,), **options)
        return jnp.mean(lse.reshape(total, 2), axis=1) - scale * matches(a, b)

    def local(axes, rows, scalars):
        a, b = rows
        all_a, all_b = gather(a, axes), gather(b, axes)
        index = row_numbers(axes, a.shape[0])

        def tile(carry, rows, valid):
            a, b, index = rows
            own = index[:, None] == jnp.arange(total)
            excluded = excluded_pairs(index, None, jnp.arange(total), None, size)

            def anchors(x, same, other):
                same = jnp.where(own | excluded, NEVER, _logits(x, same, scalars, product))
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
    """1 for each row of a whose match is nearer than every other row of b, else 0; a tie is a miss.

    No gradient flows. `groups` and `chunk` as in `info_nce`.
    """
    size, total = group_size(a, b, groups), a.shape[0]
    a, b = lax.stop_gradient(a), lax.stop_gradient(b)
    form = pick_form(form, b)
    if form != "gather":
        score, one = _score(a, size, itself=False), jnp.ones((), wide(a))

        def not_below_match(rows, visitors, scalars):
            constants, match = rows.constants
            scores = score(Rows(rows.values, constants), visitors, scalars)
            return (scores >= match[:, None]).astype(scores.dtype)

        rows, match = _rows(a, None, True), ring.matches(a, b, chunk=chunk)
        rows = rows._replace(constants=(rows.constants, match))
        visitors, options = _rows(b, None, True), {"chunk": chunk, "form": form}
        worse, _ = ring.pairwise_reduce(not_below_match, LARGEST, rows, visitors, (one,), **options)
        return (worse < 1).astype(worse.dtype)

    def local(axes, rows, scalars):
        a, b = rows
        all_b = gather(b, axes)
        index = row_numbers(axes, a.shape[0])

        def tile(carry, rows, valid):
            a, index = rows
            scores = product(a, all_b)
            match = jnp.take_along_axis(scores, index[:, None], axis=1)
            other = (scores >= match) & (jnp.arange(total) != index[:, None])
            if groups > 1:
                other &= ~excluded_pairs(index, None, jnp.arange(total), None, size)
            return carry, 1.0 - jnp.any(other, axis=1).astype(scores.dtype)

        return tiles(tile, (), (a, index), chunk, total, axes)[1]

    return spread(local, (a, b), ())


def _logits(a, b, scalars, multiply):
    """scale·a·b [c t] of all pairs, plus the bias if `scalars` has one."""
    scale, *bias = scalars
    logits = scale * multiply(a, b)
    return logits + bias[0] if bias else logits


def _pairwise_loss(
    reduction: Reduction, finish: Callable, a, b, ids, scalars, *, size, columns, chunk, form
):
    """A loss that is made of one reduction of `_logits` over each row's pairs.

    `finish(a, b, scalars)` returns the function from the rows' reductions, and with `columns` those
    of b's rows, to values per row. It is called on each device's rows or on the whole batch.
    """
    masked = ids is not None or size is not None
    if form == "gather":
        return _gathered(reduction, finish, a, b, ids, scalars, size, columns, chunk, masked)
    rows, visitors = _rows(a, ids, masked), _rows(b, ids, masked)
    options = {"chunk": chunk, "columns": columns, "form": form}
    score = _score(a, size)
    reduced = ring.pairwise_reduce(score, reduction, rows, visitors, scalars, **options)
    return finish(a, b, scalars)(*reduced)


def _gathered(reduction, finish, a, b, ids, scalars, size, columns, chunk, masked):
    """`_pairwise_loss` in the form "gather"."""
    total, nothing = a.shape[0], reduction.start

    def local(axes, rows, scalars):
        a, b, ids = rows
        all_b, all_ids = gather(b, axes), gather(ids, axes)
        index = row_numbers(axes, a.shape[0])

        def tile(carry, rows, valid):
            a, ids, index = rows
            each = reduction.each(_logits(a, all_b, scalars, product))
            if masked:
                excluded = excluded_pairs(index, ids, jnp.arange(total), all_ids, size)
                each = jnp.where(excluded, nothing, each)
            if columns:
                column = reduction.of(jnp.where(valid[:, None], each, nothing), axis=0)
                carry = reduction.join(carry, column)
            return carry, reduction.of(each, axis=1)

        finished, carry = finish(a, b, scalars), ()
        if reduction.share:
            carry = jnp.full(total if columns else 0, nothing, scalars[0].dtype)
        of_columns, of_rows = tiles(tile, carry, (a, ids, index), chunk, total, axes)
        if axes and columns:  # a device has seen its own rows of every column
            of_columns = reduction.share_differentiably(of_columns, axes, index)
        return finished(of_rows, of_columns)

    return spread(local, (a, b, ids), scalars)


def _rows(values, ids, masked):
    """`Rows` with what a mask needs: their places in the batch, and ids."""
    return Rows(values, (jnp.arange(values.shape[0]), ids) if masked else None)


def _score(like, size, *, itself=True):
    """The score of `ring.pairwise_reduce` for rows like these.

    Excluded pairs, and without `itself` the pairs of one place, are `NEVER`.
    """
    dtype = narrow(like)

    def score(rows, visitors, scalars):
        def multiply(a, b):
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
