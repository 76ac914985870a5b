"""Rows spread over devices, and loops over tiles of a device's rows."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from clipx.types import batch_axes

TILE = 2**22  # elements of one tile when `chunk` is None: 16 MiB of float32


def spread(rows_fn, rows: tuple, scalars: tuple):
    """Calls `rows_fn(axes, rows, scalars)` on each device's rows. All that it returns has rows too.

    Raises `ValueError` where the rows do not divide by the number of devices.
    """
    axes = batch_axes()
    if not axes:
        return rows_fn((), rows, scalars)
    check_spread(rows[0].shape[0], axes)
    local = jax.shard_map(
        partial(rows_fn, axes),
        in_specs=(jax.tree.map(lambda _: P(axes), rows), jax.tree.map(lambda _: P(), scalars)),
        out_specs=P(axes),
    )
    return local(rows, scalars)


def size(axes) -> int:
    """The number of devices along these mesh axes."""
    return math.prod(jax.sharding.get_abstract_mesh().shape[a] for a in axes)


def check_spread(b: int, axes) -> None:
    """Raises `ValueError` where b rows do not divide by the number of devices."""
    devices = size(axes)
    if b % devices:
        raise ValueError(
            f"{b} rows cannot be spread evenly over {devices} devices (mesh axes {axes}); use a "
            f"multiple of {devices} rows"
        )


def gather(x, axes):
    """The rows of all devices; None stays None."""
    return lax.all_gather(x, axes, tiled=True) if axes and x is not None else x


def first_row(axes, b: int):
    """The place in the whole batch of a device's first row, where each device has b."""
    return lax.axis_index(axes) * b if axes else 0


def row_numbers(axes, b: int):
    """The places in the whole batch of a device's b rows."""
    return first_row(axes, b) + jnp.arange(b)


def split(x, count, chunk):
    """Rows as tiles [count chunk ...]; the last tile is padded with zeros."""
    pad = count * chunk - x.shape[0]
    if pad:
        x = jnp.pad(x, [(0, pad)] + [(0, 0)] * (x.ndim - 1))
    return x.reshape(count, chunk, *x.shape[1:])


def tiles(fn, carry, rows, chunk, total, axes):
    """Scans `fn(carry, rows, valid) -> (carry, per-row out)` over tiles of rows. Returns the same.

    The backward pass computes each tile anew. A tile has `chunk` rows; None: so many that a tile of
    `chunk` x `total` has at most `TILE` elements. The last tile is padded, and `valid` marks the
    rows that are not padding.
    """
    b = jax.tree.leaves(rows)[0].shape[0]
    chunk = min(b, chunk or max(1, TILE // total))
    count = -(-b // chunk)
    fn = jax.checkpoint(fn)
    if count == 1:
        carry, out = fn(carry, rows, jnp.ones(b, bool))
        return carry, out
    if axes:  # a scan's carry must be as device-varying going in as it is coming out
        carry = jax.tree.map(lambda x: lax.pcast(x, axes, to="varying"), carry)
    cut = partial(split, count=count, chunk=chunk)
    valid = cut(jnp.ones(b, bool))
    carry, out = lax.scan(lambda c, x: fn(c, *x), carry, (jax.tree.map(cut, rows), valid))
    return carry, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:b], out)


def scan(fn, carry, xs):
    """`lax.scan`, without a loop where it would run once."""
    if len(jax.tree.leaves(xs)[0]) > 1:
        return lax.scan(fn, carry, xs)
    carry, ys = fn(carry, jax.tree.map(lambda x: x[0], xs))
    return carry, jax.tree.map(lambda y: y[None], ys)
