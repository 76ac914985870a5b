"""Pairwise reductions with gradients written by hand: the forms "ring" and "assembly".

Ring: each device keeps its rows. The rows of the other tower, its visitors, travel from device to
device. At each stop every row meets every visitor, tile by tile, and each keeps one number. The
backward pass sends the visitors round again, with their numbers and their gradients so far, and
computes each tile anew. So memory does not grow with the rows of other devices. On one device
nothing travels.

Assembly: each device gathers all visitors at once. Their gradients are summed over devices and
scattered. This costs memory, and saves the stops.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from clipx.losses.pairwise import NEVER, Rows, narrow, narrow_product, wide
from clipx.losses.reductions import LARGEST, Reduction
from clipx.losses.tiles import check_spread, gather, scan, size, split
from clipx.types import batch_axes

TILES = 2**18, 2**22  # elements of a tile when `chunk` is None, at least and at most


def pairwise_reduce(
    score: Callable,
    reduction: Reduction,
    rows: Rows,
    visitors: Rows,
    scalars: tuple,
    *,
    chunk: int | None = None,
    elements: int = 1,
    columns: bool = False,
    form: Literal["assembly", "ring"] = "ring",
) -> tuple[Float[Array, " b"], Float[Array, " b"] | None]:
    """(a number per row, a number per visitor): the `reduction` of the logits of all their pairs.

    The logits are `score(rows, visitors, scalars)` [c t] of a tile of each, where `values` are
    float32 at least and `constants` as given; excluded pairs are `NEVER`. A score computes
    `elements` numbers for each pair. Without `columns` the visitors' numbers are None. `chunk` is
    the number of rows, and of visitors, of a tile; None picks it. Called in the global view. Raises
    `ValueError` for rows that do not divide by the number of devices.
    """
    axes = batch_axes()
    for one in (rows, visitors):
        if axes:
            check_spread(len(jax.tree.leaves(one)[0]), axes)
    together = form == "assembly" and bool(axes)
    ring = _Ring(score, reduction, axes, size(axes), chunk, elements, columns, together)
    return _reduce(ring, rows, visitors, scalars)


def mix(weigh: Callable, rows: Rows, visitors: Rows, *, chunk: int | None = None):
    """Weighted sums [b d] of the visitors' values, float32 at least.

    `weigh(rows, visitors)` gives the weights [c t] of a tile. It may weigh padding, whose values
    are 0. No gradient flows.
    """
    axes = batch_axes()
    ring = _Ring(None, LARGEST, axes, size(axes), chunk, 1, False)

    def local(rows, visitors, _):
        sides = ring.sides(visitors, visitors)
        (x, _), (y, _) = map(ring.cut, (rows, visitors), sides)
        count, c = jax.tree.leaves(x)[0].shape[:2]
        values = visitors.values

        def visit(total, y):
            def tile(_, rows):
                x, total = rows
                highest = lax.Precision.HIGHEST
                weights, table = weigh(x, y), y.values.astype(wide(values))
                return None, total + jnp.einsum("ct,td->cd", weights, table, precision=highest)

            return scan(tile, None, (x, total))[1], None

        def stop(carry, _):
            y, total = carry
            return (ring.send(y), scan(visit, total, y)[0]), None

        total = ring.vary(jnp.zeros((count, c, values.shape[1]), wide(values)))
        return _rows(ring.round(stop, (y, total))[1], rows)

    return ring.spread(local, *lax.stop_gradient((rows, visitors)), scalars=(), out=1)


def matches(a, b, *, chunk: int | None = None):
    """The product of each row with its match, the same to the bit as in a tile of both."""
    axes = batch_axes()
    ring = _Ring(None, LARGEST, axes, size(axes), chunk, 1, False)

    def own(tiles):
        return jnp.diagonal(narrow_product(*(x.astype(wide(x)) for x in tiles), narrow(a)))

    def local(a, b, _):
        side = min(ring.sides(Rows(a), Rows(b)))
        return _rows(lax.map(own, (ring.cut(a, side)[0], ring.cut(b, side)[0])), a)

    return ring.spread(local, a, b, scalars=(), out=1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _reduce(ring, rows, visitors, scalars):
    return ring.spread(ring.reduce, rows, visitors, scalars=scalars, out=2)


def _reduce_forward(ring, rows, visitors, scalars):
    reduced = _reduce(ring, rows, visitors, scalars)
    return reduced, (rows, visitors, scalars, reduced)


def _reduce_backward(ring, kept, slopes):
    rows, visitors, scalars, reduced = kept
    marked = list(zip((rows, visitors), reduced, slopes))
    *values, scalars = ring.spread(ring.gradients, *marked, scalars=scalars, out=3)
    return (*(Rows(x, None) for x in values), scalars)


_reduce.defvjp(_reduce_forward, _reduce_backward)


@dataclasses.dataclass(frozen=True)
class _Ring:
    """What is static in a reduction. Its methods run on each device's rows."""

    score: Callable
    reduction: Reduction
    axes: tuple[str, ...]
    devices: int
    chunk: int | None
    elements: int
    columns: bool
    together: bool = False  # an assembly: all visitors are gathered

    def reduce(self, rows, visitors, scalars):
        """What `pairwise_reduce` returns, of each device's rows."""
        visitors = self.arrive(visitors)
        sides = self.sides(rows, visitors)
        (x, x_real), (y, y_real) = map(self.cut, (rows, visitors), sides)
        scalars, reduce, join = self.vary(scalars), self.reduction.reduce, self.reduction.join

        def nothing(tree):
            shape = jax.tree.leaves(tree)[0].shape[:2]
            return self.vary(jnp.full(shape, self.reduction.start, scalars[0].dtype))

        def visit(seen, visitors):
            y, y_real, column = visitors

            def tile(column, rows):
                x, x_real, row = rows
                logits = self.logits(_widened(x), _widened(y), (x_real, y_real), scalars)
                column = join(column, reduce(logits, axis=0)) if self.columns else None
                return column, join(row, reduce(logits, axis=1))

            column, seen = scan(tile, column, (x, x_real, seen))
            return seen, column

        def stop(carry, _):
            y, seen, columns = carry
            away, columns = self.send(y), self.send(columns)
            here = nothing(y) if self.columns else None
            seen, here = scan(visit, seen, (y, y_real, here))
            return (away, seen, join(columns, here) if self.columns else None), None

        start = y, nothing(x), nothing(y) if self.columns else None
        _, seen, columns = self.round(stop, start)
        columns = _rows(self.send(columns), visitors)
        if self.together and self.columns:  # each device keeps its own
            columns = self.reduction.share(columns, self.axes)
        return _rows(seen, rows), columns

    def gradients(self, rows, visitors, scalars):
        """Gradients by the values of each device's rows, those of its visitors, and the scalars.

        `rows` and `visitors` come as (`Rows`, their numbers, the gradients by these numbers)."""
        visitors = self.arrive(visitors)
        sides = self.sides(rows[0], visitors[0])
        (x, x_real), (y, y_real) = map(self.cut, (rows, visitors), sides)
        scalars = self.vary(scalars)

        def nothing(tree):
            return self.vary(jax.tree.map(lambda x: jnp.zeros(x.shape, wide(x)), tree))

        def visit(carry, visitors):
            y, y_real = visitors

            def tile(carry, rows):
                dx, dy, ds = carry
                i, x, x_real = rows
                gx, gy, gs = self.tile_gradients(x, y, (x_real, y_real), scalars)
                dx = jax.tree.map(lambda d, g: d.at[i].add(g), dx, gx)
                return (dx, _sum(dy, gy), _sum(ds, gs)), None

            (dx, ds), dy = carry, nothing(y[0].values)
            places = jnp.arange(len(jax.tree.leaves(x)[0]))
            (dx, dy, ds), _ = scan(tile, (dx, dy, ds), (places, x, x_real))
            return (dx, ds), dy

        def stop(carry, _):
            y, dx, dy, ds = carry
            away, dy = self.send(y), self.send(dy)  # while this stop's gradients are computed
            (dx, ds), here = scan(visit, (dx, ds), (y, y_real))
            return (away, dx, _sum(dy, here), ds), None

        start = y, nothing(x[0].values), nothing(y[0].values), nothing(scalars)
        _, dx, dy, ds = self.round(stop, start)
        dx, dy = (_rows(d, one) for d, one in ((dx, rows), (self.send(dy), visitors)))
        if self.together:
            dy = jax.tree.map(lambda x: lax.psum_scatter(x, self.axes, tiled=True), dy)
        dx, dy = (
            jax.tree.map(lambda d, x: d.astype(x.dtype), d, one[0].values)
            for d, one in ((dx, rows), (dy, visitors))
        )
        return dx, dy, lax.psum(ds, self.axes) if self.axes else ds

    def tile_gradients(self, x, y, real, scalars):
        """Gradients by the values of a tile of rows, of a tile of visitors, and by the scalars."""
        (x, whole, slope), (y, column_whole, column_slope) = x, y

        def logits(x_values, y_values, scalars):
            ours, theirs = x._replace(values=x_values), y._replace(values=y_values)
            return self.logits(ours, theirs, real, scalars)

        x, y = _widened(x), _widened(y)
        logits, pull = jax.vjp(logits, x.values, y.values, scalars)
        each = slope[:, None] * self.reduction.slope(logits, whole[:, None])
        if self.columns:
            each += column_slope * self.reduction.slope(logits, column_whole)
        return pull(each)

    def logits(self, x, y, real, scalars):
        """The logits of a tile of rows and one of visitors; `NEVER` for padding."""
        logits = self.score(x, y, scalars)
        for here, axis in zip(real, (1, 0)):
            if here is not None:
                logits = jnp.where(jnp.expand_dims(here, axis), logits, NEVER)
        return logits

    def sides(self, rows, visitors) -> tuple[int, int]:
        """(rows of a tile, visitors of a tile).

        Without `chunk` a tile's logits take as much memory as a device's rows, within bounds. That
        is little beside the rows, and larger tiles take fewer cycles. By the TPU's compiler,
        1,048,576 rows of InfoNCE on 16 v5e chips: 12.1 G cycles and 833 MiB with tiles of 2**18,
        6.0 G and 897 with 2**20, 4.1 G and 898 with 2**22.
        """
        if self.chunk:
            return self.chunk, self.chunk
        least, most = TILES
        held = (
            max(sum(x.size for x in jax.tree.leaves(one.values)) for one in (rows, visitors)) // 2
        )
        pairs = max(1, min(max(held, least), most) // self.elements)
        side = 2 ** (pairs.bit_length() // 2 - (pairs.bit_length() % 2 == 0))
        side = min(side, len(jax.tree.leaves(rows)[0]))
        return side, max(1, 2 ** (pairs.bit_length() - 1) // side)

    def cut(self, tree, side):
        """(tiles [count c ...] of a device's rows, mask of those that are no padding or None)."""
        b = len(jax.tree.leaves(tree)[0])
        chunk = min(b, side)
        count = -(-b // chunk)
        chunk = chunk if self.chunk else -(-b // count)  # as even as can be
        cut = jax.tree.map(partial(split, count=count, chunk=chunk), tree)
        return cut, None if count * chunk == b else split(jnp.ones(b, bool), count, chunk)

    def arrive(self, visitors):
        """The visitors of a device's first stop: in an assembly all, in a ring its own."""
        return (
            jax.tree.map(partial(gather, axes=self.axes), visitors) if self.together else visitors
        )

    def round(self, stop, carry):
        """Runs `stop` as often as visitors stop. Each then is at the device before its own."""
        if not self.axes or self.together:
            return stop(carry, None)[0]
        return lax.scan(stop, carry, length=self.devices)[0]

    def send(self, tree):
        """Sends arrays from each device to the next."""
        if not self.axes or self.together:
            return tree
        turn = [(i, (i + 1) % self.devices) for i in range(self.devices)]
        return jax.tree.map(lambda x: lax.ppermute(x, self.axes, turn), tree)

    def spread(self, fn, *rows, scalars, out):
        """Calls `fn(*rows, scalars)` on each device's rows.

        It returns `out` trees: two of rows, and the third of scalars."""
        if not self.axes:
            return fn(*rows, scalars)
        specs = P(self.axes), P(self.axes), P()
        out = specs[:out] if out > 1 else specs[0]
        return jax.shard_map(fn, in_specs=specs, out_specs=out)(*rows, scalars)

    def vary(self, tree):
        """The tree, marked as device-varying: a scan's carry must be so from the start."""
        return (
            jax.tree.map(lambda x: lax.pcast(x, self.axes, to="varying"), tree)
            if self.axes
            else tree
        )


def _rows(tree, like):
    """The rows of tiles [count c ...] without their padding: as many as `like` has."""
    b = len(jax.tree.leaves(like)[0])
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:b], tree)


def _widened(rows):
    return rows._replace(values=jax.tree.map(lambda x: x.astype(wide(x)), rows.values))


def _sum(a, b):
    return jax.tree.map(jnp.add, a, b)
