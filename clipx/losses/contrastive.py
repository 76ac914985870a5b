"""Losses in which every row meets every other row.

Each returns a value per row; the mean is the caller's. Rows come unit-normalised. Called inside
`jax.set_mesh(...)`, rows are spread over the batch axes: one tower is gathered, the other stays
where it is and meets it tile by tile, and a tile is recomputed in the backward pass, so that no
b x B block is ever held. Without a mesh the same code runs on one device, and the numbers agree.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from clipx.types import batch_axes

_NEVER = -1e30  # a masked logit: finite, so that no gradient is NaN
_TILE = 2**22  # elements of one tile when `chunk` is None: 16 MiB of float32


def _spread(rows_fn, rows: tuple, scalars: tuple):
    """`rows_fn(axes, rows, scalars)` on each device's rows; what it returns has rows too."""
    axes = batch_axes()
    if not axes:
        return rows_fn((), rows, scalars)
    devices = math.prod(jax.sharding.get_abstract_mesh().shape[a] for a in axes)
    b = rows[0].shape[0]
    if b % devices:
        raise ValueError(
            f"{b} rows cannot be spread evenly over {devices} devices (mesh axes {axes}); use a "
            f"multiple of {devices} rows"
        )
    spread = jax.shard_map(
        partial(rows_fn, axes),
        in_specs=(jax.tree.map(lambda _: P(axes), rows), jax.tree.map(lambda _: P(), scalars)),
        out_specs=P(axes),
    )
    return spread(rows, scalars)


def _gather(x, axes):
    return lax.all_gather(x, axes, tiled=True) if axes and x is not None else x


def _first_row(axes, b):
    return lax.axis_index(axes) * b if axes else 0


def _tiles(fn, carry, rows, chunk, total, axes):
    """Scans `fn(carry, rows, valid) -> (carry, per-row out)` over tiles of rows, each recomputed in
    the backward pass. The last tile is padded; `valid` says which of its rows are real."""
    b = jax.tree.leaves(rows)[0].shape[0]
    chunk = min(b, chunk or max(1, _TILE // total))
    count = -(-b // chunk)
    fn = jax.checkpoint(fn)
    if count == 1:
        carry, out = fn(carry, rows, jnp.ones(b, bool))
        return carry, out
    pad = count * chunk - b

    def split(x):
        x = jnp.pad(x, [(0, pad)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(count, chunk, *x.shape[1:])

    if axes:  # a scan's carry must be as device-varying going in as it is coming out
        carry = jax.tree.map(lambda x: lax.pcast(x, axes, to="varying"), carry)
    valid = split(jnp.ones(b, bool))
    carry, out = lax.scan(lambda c, x: fn(c, *x), carry, (jax.tree.map(split, rows), valid))
    return carry, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:b], out)


def _product(a, b):
    """a @ b.T, accumulated in float32 at least and never rounded below the inputs' own dtype."""
    wide = jnp.promote_types(a.dtype, jnp.float32)
    return jnp.einsum(
        "id,jd->ij", a, b, preferred_element_type=wide, precision=lax.Precision.HIGHEST
    )


def _matches(a, b):
    wide = jnp.promote_types(a.dtype, jnp.float32)
    return jnp.sum(a.astype(wide) * b.astype(wide), axis=-1)


def _stranger(index, ids, total, all_ids, groups):
    """Which of all rows [c, B] are neither row i itself nor its negative: another pair with the
    same id, or a row of another group."""
    columns = jnp.arange(total)
    out = jnp.zeros((index.shape[0], total), bool)
    if all_ids is not None:
        out |= (ids[:, None] == all_ids[None, :]) & (index[:, None] != columns[None, :])
    if groups > 1:
        size = total // groups
        out |= (index // size)[:, None] != (columns // size)[None, :]
    return out


def _check(a, b, groups):
    if a.shape != b.shape:
        raise ValueError(f"the two towers' rows differ in shape: {a.shape} and {b.shape}")
    if groups < 1 or a.shape[0] % groups:
        raise ValueError(f"{a.shape[0]} rows do not divide into groups={groups}")


def info_nce(
    a: Float[Array, "b d"],
    b: Float[Array, "b d"],
    *,
    scale: Float[Array, ""] | float,
    symmetric: bool = True,
    ids: Int[Array, " b"] | None = None,
    groups: int = 1,
    chunk: int | None = None,
) -> Float[Array, " b"]:
    """Cross-entropy of each row's match among all rows, in nats: half a→b and half b→a.

    With `symmetric=False` a→b alone. Pairs with equal `ids` are no negatives of each other. Rows
    meet only within their run of B/groups rows, as on `groups` devices that share nothing.
    `chunk` is the number of rows a tile holds; None picks it. Source: CLIP (arXiv 2103.00020),
    figure 3; the log-sum-exp runs in float32 for any input.
    """
    _check(a, b, groups)
    total = a.shape[0]
    masked = ids is not None or groups > 1

    def local(axes, rows, scalars):
        a, b, ids = rows
        (scale,) = scalars
        all_b, all_ids = _gather(b, axes), _gather(ids, axes)
        index = _first_row(axes, a.shape[0]) + jnp.arange(a.shape[0])

        def tile(columns, rows, valid):
            a, ids, index = rows
            logits = scale * _product(a, all_b)
            if masked:
                logits = jnp.where(_stranger(index, ids, total, all_ids, groups), _NEVER, logits)
            if not symmetric:
                return columns, jax.nn.logsumexp(logits, axis=1)
            column = jax.nn.logsumexp(jnp.where(valid[:, None], logits, _NEVER), axis=0)
            return jnp.logaddexp(columns, column), jax.nn.logsumexp(logits, axis=1)

        match = scale * _matches(a, b)
        columns = jnp.full(total if symmetric else 0, _NEVER, match.dtype)
        columns, row_lse = _tiles(tile, columns, (a, ids, index), chunk, total, axes)
        if not symmetric:
            return row_lse - match
        if axes:  # each device has seen its own rows of every column
            peak = lax.pmax(lax.stop_gradient(columns), axes)
            share = lax.psum_scatter(jnp.exp(columns - peak), axes, tiled=True)
            columns = jnp.log(share) + peak[index]
        return 0.5 * (row_lse - match) + 0.5 * (columns - match)

    wide = jnp.promote_types(a.dtype, jnp.float32)
    return _spread(local, (a, b, ids), (jnp.asarray(scale, wide),))


def sigmoid(
    a: Float[Array, "b d"],
    b: Float[Array, "b d"],
    *,
    scale: Float[Array, ""] | float,
    bias: Float[Array, ""] | float,
    ids: Int[Array, " b"] | None = None,
    groups: int = 1,
    chunk: int | None = None,
) -> Float[Array, " b"]:
    """SigLIP's loss of each row of a, in nats, summed over its pairs with all rows of b.

    The match is a positive, every other pair a negative: -log σ(±(scale·a·b + bias)); their mean
    over rows is the loss of arXiv 2303.15343, algorithm 1. No label matrix is built, since
    softplus(-x) = softplus(x) - x. `ids`, `groups` and `chunk` as in `info_nce`.
    """
    _check(a, b, groups)
    total = a.shape[0]
    masked = ids is not None or groups > 1

    def local(axes, rows, scalars):
        a, b, ids = rows
        scale, bias = scalars
        all_b, all_ids = _gather(b, axes), _gather(ids, axes)
        index = _first_row(axes, a.shape[0]) + jnp.arange(a.shape[0])

        def tile(carry, rows, valid):
            a, ids, index = rows
            pairs = jax.nn.softplus(scale * _product(a, all_b) + bias)
            if masked:
                pairs = jnp.where(_stranger(index, ids, total, all_ids, groups), 0.0, pairs)
            return carry, jnp.sum(pairs, axis=1)

        _, pairs = _tiles(tile, (), (a, ids, index), chunk, total, axes)
        return pairs - (scale * _matches(a, b) + bias)

    wide = jnp.promote_types(a.dtype, jnp.float32)
    return _spread(local, (a, b, ids), (jnp.asarray(scale, wide), jnp.asarray(bias, wide)))


def nt_xent(
    a: Float[Array, "b d"],
    b: Float[Array, "b d"],
    *,
    temperature: float = 0.1,
    groups: int = 1,
    chunk: int | None = None,
) -> Float[Array, " b"]:
    """SimCLR's cross-entropy of each row's two views, in nats, the mean over both.

    A view's match is the row's other view; its negatives are both views of every other row, so a
    view never meets itself. The mean over rows is the loss of arXiv 2002.05709, algorithm 1, and of
    SLIP. `groups` and `chunk` as in `info_nce`.
    """
    _check(a, b, groups)
    total = a.shape[0]

    def local(axes, rows, scalars):
        a, b = rows
        (scale,) = scalars
        all_a, all_b = _gather(a, axes), _gather(b, axes)
        index = _first_row(axes, a.shape[0]) + jnp.arange(a.shape[0])

        def tile(carry, rows, valid):
            a, b, index = rows
            own = index[:, None] == jnp.arange(total)
            foreign = _stranger(index, None, total, None, groups)

            def anchors(x, same, other):
                same = jnp.where(own | foreign, _NEVER, scale * _product(x, same))
                other = jnp.where(foreign, _NEVER, scale * _product(x, other))
                lse = jax.nn.logsumexp
                return jnp.logaddexp(lse(same, axis=1), lse(other, axis=1))

            return carry, 0.5 * anchors(a, all_a, all_b) + 0.5 * anchors(b, all_b, all_a)

        _, lse = _tiles(tile, (), (a, b, index), chunk, 4 * total, axes)
        return lse - scale * _matches(a, b)

    wide = jnp.promote_types(a.dtype, jnp.float32)
    return _spread(local, (a, b), (jnp.asarray(1 / temperature, wide),))


def recall_at_1(
    a: Float[Array, "b d"],
    b: Float[Array, "b d"],
    *,
    groups: int = 1,
    chunk: int | None = None,
) -> Float[Array, " b"]:
    """1 for each row of a whose match is nearer than every other row of b, else 0; a tie is a miss.

    No gradient flows. `groups` and `chunk` as in `info_nce`.
    """
    _check(a, b, groups)
    total = a.shape[0]

    def local(axes, rows, scalars):
        a, b = rows
        all_b = _gather(b, axes)
        index = _first_row(axes, a.shape[0]) + jnp.arange(a.shape[0])

        def tile(carry, rows, valid):
            a, index = rows
            scores = _product(a, all_b)
            match = jnp.take_along_axis(scores, index[:, None], axis=1)
            other = (scores >= match) & (jnp.arange(total) != index[:, None])
            if groups > 1:
                other &= ~_stranger(index, None, total, None, groups)
            return carry, 1.0 - jnp.any(other, axis=1).astype(scores.dtype)

        return _tiles(tile, (), (a, index), chunk, total, axes)[1]

    return _spread(local, (lax.stop_gradient(a), lax.stop_gradient(b)), ())


def nearest(
    query: Float[Array, "b d"], bank: Float[Array, "*g k d"], *, chunk: int | None = None
) -> Float[Array, "b d"]:
    """The bank's row of largest cosine with each row of `query`, as it is stored; ties: the first.

    No gradient flows. The bank is whole on every device and searched in tiles of `chunk` rows of
    `query`. A bank [g k d] holds one for each of g groups of b/g rows, as g devices that share
    nothing would. Source: DeCLIP (arXiv 2110.05208), section 3.2.
    """
    groups = bank.shape[0] if bank.ndim == 3 else 1
    if query.shape[0] % groups:
        raise ValueError(f"{query.shape[0]} rows do not divide into {groups} banks")
    size = query.shape[0] // groups

    def search(axes, query, bank):
        wide = jnp.promote_types(bank.dtype, jnp.float32)
        norm = jnp.sqrt(jnp.sum(jnp.square(bank.astype(wide)), axis=-1))
        inverse = 1 / jnp.maximum(norm, 1e-12)

        def tile(carry, query, valid):
            return carry, jnp.argmax(_product(query, bank) * inverse, axis=1)

        return bank[_tiles(tile, (), query, chunk, bank.shape[0], axes)[1]]

    def local(axes, rows, scalars):
        (query,), (bank,) = rows, scalars
        if bank.ndim == 2:
            return search(axes, query, bank)
        block = math.gcd(query.shape[0], size)  # rows of one device and of one group
        blocks = query.reshape(-1, block, query.shape[1])
        first = _first_row(axes, query.shape[0]) + block * jnp.arange(blocks.shape[0])
        found = lax.map(lambda x: search(axes, x[0], bank[x[1]]), (blocks, first // size))
        return found.reshape(query.shape[0], -1)

    return _spread(local, (lax.stop_gradient(query),), (lax.stop_gradient(bank),))


def enqueue(
    queue: Float[Array, "*g k d"], pointer: Int[Array, ""], rows: Float[Array, "b d"]
) -> tuple[Float[Array, "*g k d"], Int[Array, ""]]:
    """The queue with `rows` written from `pointer` on, and the next pointer.

    Rows that reach or pass the end put the pointer back to 0, and those beyond it are dropped, as
    DeCLIP's memory bank has it (memory_bank.py): nothing wraps. Call `nearest` first: a batch is
    not to find itself. A queue [g k d] has one for each of g groups of b/g rows. No gradient flows.
    """
    rows = lax.stop_gradient(rows).astype(queue.dtype)
    if batch_axes():  # the queue is whole on every device
        rows = lax.with_sharding_constraint(rows, P())
    groups = queue.shape[0] if queue.ndim == 3 else 1
    if rows.shape[0] % groups:
        raise ValueError(f"{rows.shape[0]} rows do not divide into {groups} queues")
    rows = rows.reshape(*queue.shape[:-2], -1, rows.shape[-1])
    end = pointer + rows.shape[-2]
    places = pointer + jnp.arange(rows.shape[-2])
    queue = jnp.asarray(queue).at[..., places, :].set(rows, mode="drop", unique_indices=True)
    return queue, jnp.where(end >= queue.shape[-2], 0, end).astype(pointer.dtype)
