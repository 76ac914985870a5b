"""Losses in which every row meets every other row.

Each returns a value per row; the mean is the caller's. Rows come unit-normalised. Called inside
`jax.set_mesh(...)`, rows are spread over the batch axes; without a mesh the same code runs on one
device, and the numbers agree. Three forms compute the same, and none keeps a b x B block:

    gather: one tower is gathered, the other stays where it is and meets it tile by tile; a tile is
      recomputed in the backward pass.
    assembly: the same with gradients written by hand: fewer passes over each tile.
    ring: nothing is gathered. One tower goes round the devices, in the backward pass once more with
      its gradients; memory does not grow with the rows of other devices (`clipx.losses.ring`).

`form=None` chooses by `pick_form`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from clipx.losses import ring
from clipx.losses.forms import Form, pick_form
from clipx.losses.reductions import LARGEST, LOG_SUM_EXP, SUM_SOFTPLUS
from clipx.losses.ring import Rows
from clipx.losses.tiles import (
    NEVER,
    gather,
    group_size,
    matches,
    narrow,
    narrow_product,
    product,
    row_numbers,
    spread,
    stranger,
    tiles,
    wide,
)


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
    size, total = group_size(a, b, groups), a.shape[0]
    masked = ids is not None or groups > 1
    scale = jnp.asarray(scale, wide(a))
    form = pick_form(form, b)
    if form != "gather":
        row_lse, column_lse = ring.meet(
            _score(a, size),
            LOG_SUM_EXP,
            _rows(a, ids, masked),
            _rows(b, ids, masked),
            (scale,),
            chunk=chunk,
            columns=symmetric,
            together=form == "assembly",
        )
        match = scale * matches(a, b)
        if not symmetric:
            return row_lse - match
        return 0.5 * (row_lse - match) + 0.5 * (column_lse - match)

    def local(axes, rows, scalars):
        a, b, ids = rows
        (scale,) = scalars
        all_b, all_ids = gather(b, axes), gather(ids, axes)
        index = row_numbers(axes, a.shape[0])

        def tile(columns, rows, valid):
            a, ids, index = rows
            logits = scale * product(a, all_b)
            if masked:
                foreign = stranger(index, ids, jnp.arange(total), all_ids, size)
                logits = jnp.where(foreign, NEVER, logits)
            if not symmetric:
                return columns, jax.nn.logsumexp(logits, axis=1)
            column = jax.nn.logsumexp(jnp.where(valid[:, None], logits, NEVER), axis=0)
            return jnp.logaddexp(columns, column), jax.nn.logsumexp(logits, axis=1)

        match = scale * matches(a, b)
        columns = jnp.full(total if symmetric else 0, NEVER, match.dtype)
        columns, row_lse = tiles(tile, columns, (a, ids, index), chunk, total, axes)
        if not symmetric:
            return row_lse - match
        if axes:  # each device has seen its own rows of every column
            peak = lax.pmax(lax.stop_gradient(columns), axes)
            share = lax.psum_scatter(jnp.exp(columns - peak), axes, tiled=True)
            columns = jnp.log(share) + peak[index]
        return 0.5 * (row_lse - match) + 0.5 * (columns - match)

    return spread(local, (a, b, ids), (scale,))


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
    size, total = group_size(a, b, groups), a.shape[0]
    masked = ids is not None or groups > 1
    scale, bias = jnp.asarray(scale, wide(a)), jnp.asarray(bias, wide(a))
    form = pick_form(form, b)
    if form != "gather":
        pairs, _ = ring.meet(
            _score(a, size),
            SUM_SOFTPLUS,
            _rows(a, ids, masked),
            _rows(b, ids, masked),
            (scale, bias),
            chunk=chunk,
            together=form == "assembly",
        )
        return pairs - (scale * matches(a, b) + bias)

    def local(axes, rows, scalars):
        a, b, ids = rows
        scale, bias = scalars
        all_b, all_ids = gather(b, axes), gather(ids, axes)
        index = row_numbers(axes, a.shape[0])

        def tile(carry, rows, valid):
            a, ids, index = rows
            pairs = jax.nn.softplus(scale * product(a, all_b) + bias)
            if masked:
                foreign = stranger(index, ids, jnp.arange(total), all_ids, size)
                pairs = jnp.where(foreign, 0.0, pairs)
            return carry, jnp.sum(pairs, axis=1)

        _, pairs = tiles(tile, (), (a, ids, index), chunk, total, axes)
        return pairs - (scale * matches(a, b) + bias)

    return spread(local, (a, b, ids), (scale, bias))


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
        how = {"chunk": chunk, "together": form == "assembly"}
        lse, _ = ring.meet(score, LOG_SUM_EXP, views, views, (scale,), **how)
        return jnp.mean(lse.reshape(total, 2), axis=1) - scale * matches(a, b)

    def local(axes, rows, scalars):
        a, b = rows
        (scale,) = scalars
        all_a, all_b = gather(a, axes), gather(b, axes)
        index = row_numbers(axes, a.shape[0])

        def tile(carry, rows, valid):
            a, b, index = rows
            own = index[:, None] == jnp.arange(total)
            foreign = stranger(index, None, jnp.arange(total), None, size)

            def anchors(x, same, other):
                same = jnp.where(own | foreign, NEVER, scale * product(x, same))
                other = jnp.where(foreign, NEVER, scale * product(x, other))
                lse = jax.nn.logsumexp
                return jnp.logaddexp(lse(same, axis=1), lse(other, axis=1))

            return carry, 0.5 * anchors(a, all_a, all_b) + 0.5 * anchors(b, all_b, all_a)

        _, lse = tiles(tile, (), (a, b, index), chunk, 4 * total, axes)
        return lse - scale * matches(a, b)

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

        def nearer(rows, visitors, scalars):
            constants, match = rows.constants
            scores = score(Rows(rows.values, constants), visitors, scalars)
            return (scores >= match[:, None]).astype(scores.dtype)

        rows, match = _rows(a, None, True), ring.matches(a, b, chunk=chunk)
        rows = rows._replace(constants=(rows.constants, match))
        how = {"chunk": chunk, "together": form == "assembly"}
        found, _ = ring.meet(nearer, LARGEST, rows, _rows(b, None, True), (one,), **how)
        return (found < 1).astype(found.dtype)

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
                other &= ~stranger(index, None, jnp.arange(total), None, size)
            return carry, 1.0 - jnp.any(other, axis=1).astype(scores.dtype)

        return tiles(tile, (), (a, index), chunk, total, axes)[1]

    return spread(local, (a, b), ())


def _rows(values, ids, masked):
    """What goes round: rows, and where a mask needs them their numbers and ids."""
    return Rows(values, (jnp.arange(values.shape[0]), ids) if masked else None)


def _score(like, size, *, itself=True):
    """scale·a·b [c, t] of rows like these, plus a bias if there is one; `NEVER` for strangers and,
    unless `itself`, for a row and the one of its own number."""
    dtype = narrow(like)

    def score(rows, visitors, scalars):
        scale, *bias = scalars
        logits = scale * narrow_product(rows.values, visitors.values, dtype)
        logits = logits + bias[0] if bias else logits
        if rows.constants is None:
            return logits
        (index, ids), (columns, all_ids) = rows.constants, visitors.constants
        never = stranger(index, ids, columns, all_ids, size)
        if not itself:
            never |= index[:, None] == columns
        return jnp.where(never, NEVER, logits)

    return score
