"""What losses in which rows meet are made from: rows spread over devices, and met tile by tile."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from clipx.types import batch_axes

NEVER = -1e30  # a masked logit: finite, so that no gradient is NaN
TILE = 2**22  # elements of one tile when `chunk` is None: 16 MiB of float32


def wide(*arrays):
    """Float32, or float64 where an array is."""
    return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)


def spread(rows_fn, rows: tuple, scalars: tuple):
    """`rows_fn(axes, rows, scalars)` on each device's rows; what it returns has rows too."""
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
    """How many devices the rows are spread over."""
    return math.prod(jax.sharding.get_abstract_mesh().shape[a] for a in axes)


def check_spread(b, axes):
    devices = size(axes)
    if b % devices:
        raise ValueError(
            f"{b} rows cannot be spread evenly over {devices} devices (mesh axes {axes}); use a "
            f"multiple of {devices} rows"
        )


def group_size(a, b, groups: int) -> int | None:
    """Rows of each of so many groups, None where there is one. Raises `ValueError` for towers whose
    rows differ in shape, and for rows that do not divide into the groups."""
    if a.shape != b.shape:
        raise ValueError(f"the two towers' rows differ in shape: {a.shape} and {b.shape}")
    if groups < 1 or a.shape[0] % groups:
        raise ValueError(f"{a.shape[0]} rows do not divide into groups={groups}")
    return a.shape[0] // groups if groups > 1 else None


def gather(x, axes):
    return lax.all_gather(x, axes, tiled=True) if axes and x is not None else x


def first_row(axes, b):
    return lax.axis_index(axes) * b if axes else 0


def row_numbers(axes, b):
    """The places of a device's rows among those of all devices."""
    return first_row(axes, b) + jnp.arange(b)


def split(x, count, chunk):
    """[count chunk ...] of rows, the last tile padded with zeros."""
    pad = count * chunk - x.shape[0]
    if pad:
        x = jnp.pad(x, [(0, pad)] + [(0, 0)] * (x.ndim - 1))
    return x.reshape(count, chunk, *x.shape[1:])


def tiles(fn, carry, rows, chunk, total, axes):
    """Scans `fn(carry, rows, valid) -> (carry, per-row out)` over tiles of rows, each recomputed in
    the backward pass. The last tile is padded; `valid` says which of its rows are real."""
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


def product(a, b):
    """a @ b.T, accumulated in float32 at least and never rounded below the inputs' own dtype."""
    if a.dtype == b.dtype == jnp.bfloat16:
        return narrow_product(a.astype(jnp.float32), b.astype(jnp.float32), jnp.bfloat16)
    highest = lax.Precision.HIGHEST
    return jnp.einsum("id,jd->ij", a, b, preferred_element_type=wide(a), precision=highest)


def narrow(x):
    """The dtype in which rows of x are multiplied: theirs where a gradient fits its range."""
    return jnp.bfloat16 if x.dtype == jnp.bfloat16 else wide(x)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def narrow_product(a, b, dtype):
    """a @ b.T of wide rows that were of `dtype` before, at that dtype's speed in both passes: three
    products of bfloat16 instead of one, and twice six of float32."""
    return _einsum("id,jd->ij", a, b, dtype)


def _einsum(how, a, b, dtype):
    a, b, out = a.astype(dtype), b.astype(dtype), wide(a)
    highest = lax.Precision.HIGHEST
    return jnp.einsum(how, a, b, preferred_element_type=out, precision=highest)


def _narrow_backward(dtype, rows, slopes):
    a, b = rows
    return _einsum("ij,jd->id", slopes, b, dtype), _einsum("ij,id->jd", slopes, a, dtype)


narrow_product.defvjp(
    lambda a, b, dtype: (_einsum("id,jd->ij", a, b, dtype), (a, b)), _narrow_backward
)


def matches(a, b):
    """The product of each row with its own match."""
    return jnp.sum(a.astype(wide(a)) * b.astype(wide(a)), axis=-1)


def stranger(index, ids, columns, all_ids, size: int | None):
    """Which rows [c, t] are neither row i itself nor its negative: another pair with the same id,
    or a row of another group, of `size` rows; None: there is one group."""
    out = jnp.zeros((index.shape[0], columns.shape[0]), bool)
    if all_ids is not None:
        out |= (ids[:, None] == all_ids[None, :]) & (index[:, None] != columns[None, :])
    if size is not None:
        out |= (index // size)[:, None] != (columns // size)[None, :]
    return out
