"""Rows sharded over devices, and loops over tiles of a device's rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from clipx.types import Array, PyTree, batch_axes

TILE = 2**22  # elements of one tile when `chunk` is None: 16 MiB of float32
Axes = tuple[str, ...]  # mesh axes over which rows are sharded; () on one device


def spread(rows_fn: Callable, rows: PyTree, scalars: PyTree) -> Any:
    """Calls `rows_fn(axes, rows, scalars)` on the rows of each device.

    Every array of `rows` and of the result has the row axis first; `scalars` are replicated. Raises
    `ValueError` if the number of devices does not divide the rows.
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


def size(axes: Axes) -> int:
    """The number of devices along these mesh axes."""
    return math.prod(jax.sharding.get_abstract_mesh().shape[a] for a in axes)


def check_spread(b: int, axes: Axes) -> None:
    """Raises `ValueError` if the number of devices does not divide b rows."""
    devices = size(axes)
    if b % devices:
        raise ValueError(
            f"{b} rows cannot be spread evenly over {devices} devices (mesh axes {axes}); use a "
            f"multiple of {devices} rows"
        )


def gather(x: Array | None, axes: Axes) -> Any:
    """The rows of all devices; None stays None."""
    return lax.all_gather(x, axes, tiled=True) if axes and x is not None else x


def first_row(axes: Axes, b: int) -> Array | int:
    """The position in the global batch of a device's first row, if each device has b rows."""
    return lax.axis_index(axes) * b if axes else 0


def row_numbers(axes: Axes, b: int) -> Array:
    """The positions in the global batch of a device's b rows."""
    return first_row(axes, b) + jnp.arange(b)


def split(x: Array, count: int, chunk: int) -> Array:
    """Rows as tiles [count chunk ...]; the last tile is padded with zeros."""
    pad = count * chunk - x.shape[0]
    if pad:
        x = jnp.pad(x, [(0, pad)] + [(0, 0)] * (x.ndim - 1))
    return x.reshape(count, chunk, *x.shape[1:])


def tiles(
    fn: Callable, carry: PyTree, rows: PyTree, chunk: int | None, total: int, axes: Axes
) -> tuple[PyTree, PyTree]:
    """Scans `fn(carry, rows, valid) -> (carry, values per row)` over tiles of rows.

    Returns the last carry and the values of all rows. The backward pass recomputes each tile.

    A tile has `chunk` rows. For None it has as many rows as keep `rows x total` within `TILE`
    elements. The last tile is padded; `valid` is False for the rows of the padding.
    """
    b: int = jax.tree.leaves(rows)[0].shape[0]
    chunk = min(b, chunk or max(1, TILE // total))
    count = -(-b // chunk)
    fn = jax.checkpoint(fn)
    if count == 1:
        carry, out = fn(carry, rows, jnp.ones(b, bool))
        return carry, out
    if axes:  # shard_map wants a scan's first carry to be as device-varying as its last
        carry = jax.tree.map(lambda x: lax.pcast(x, axes, to="varying"), carry)
    cut = partial(split, count=count, chunk=chunk)
    valid = cut(jnp.ones(b, bool))
    carry, out = lax.scan(lambda c, x: fn(c, *x), carry, (jax.tree.map(cut, rows), valid))
    return carry, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:b], out)


def scan(fn: Callable, carry: PyTree, xs: PyTree) -> tuple[PyTree, PyTree]:
    """`lax.scan`, but without a loop if there is only one step."""
    if len(jax.tree.leaves(xs)[0]) > 1:
        return lax.scan(fn, carry, xs)
    carry, ys = fn(carry, jax.tree.map(lambda x: x[0], xs))
    return carry, jax.tree.map(lambda y: y[None], ys)
