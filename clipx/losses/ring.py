"""Rows that meet all others without being gathered.

Each device keeps its rows. Its visitors, as many rows of the other tower, go round the devices, and
at each stop every row meets every visitor in tiles. What a row has seen is summed up in one
number, which visitors can carry too. Nothing of a tile is kept: the backward pass sends the
visitors round again, with their numbers and their gradients so far, and computes each tile anew.
With one device nothing travels, and the tiles are the same. In an assembly all visitors are at each
device at a time, which costs memory, and their gradients are summed and spread again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from clipx.losses.reductions import LARGEST, Reduction
from clipx.losses.tiles import (
    NEVER,
    check_spread,
    gather,
    narrow,
    narrow_product,
    scan,
    size,
    split,
    wide,
)
from clipx.types import PyTree, batch_axes

_TILES = 2**18, 2**22  # elements of a tile when `chunk` is None, at least and at most


class Rows(NamedTuple):
    """Arrays with the row axis first: those that gradients reach, and those that none does."""

    values: PyTree
    constants: PyTree = ()


def meet(
    score: Callable,
    reduction: Reduction,
    rows: Rows,
    visitors: Rows,
    scalars: tuple,
    *,
    chunk: int | None = None,
    elements: int = 1,
    columns: bool = False,
    together: bool = False,
):
    """(a number for each row, one for each visitor or None without `columns`): the `reduction` of
    `score(rows, visitors, scalars)` [c, t] over everybody met.

    `score` sees a tile of each: `values` as float32 at least, `constants` as they are. It holds
    `elements` numbers for each pair, and masks by `NEVER`. With `together` all visitors are
    gathered instead of going round. Called in the global view.
    """
    axes = batch_axes()
    for one in (rows, visitors):
        if axes:
            check_spread(len(jax.tree.leaves(one)[0]), axes)
    together = together and bool(axes)
    ring = _Ring(score, reduction, axes, size(axes), chunk, elements, columns, together)
    return _meet(ring, rows, visitors, scalars)


def mix(weigh: Callable, rows: Rows, visitors: Rows, *, chunk: int | None = None):
    """[b d]: the sum of the visitors' values, each times its `weigh(rows, visitors)` [c t]; float32
    at least. No gradient flows, and what pads a tile has values of 0."""
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
    """The product of each row with its match, to the bit what a tile of both holds."""
    axes = batch_axes()
    ring = _Ring(None, LARGEST, axes, size(axes), chunk, 1, False)

    def own(tiles):
        return jnp.diagonal(narrow_product(*(x.astype(wide(x)) for x in tiles), narrow(a)))

    def local(a, b, _):
        side = min(ring.sides(Rows(a), Rows(b)))
        return _rows(lax.map(own, (ring.cut(a, side)[0], ring.cut(b, side)[0])), a)

    return ring.spread(local, a, b, scalars=(), out=1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _meet(ring, rows, visitors, scalars):
    return ring.spread(ring.meetings, rows, visitors, scalars=scalars, out=2)


def _meet_forward(ring, rows, visitors, scalars):
    met = _meet(ring, rows, visitors, scalars)
    return met, (rows, visitors, scalars, met)


def _meet_backward(ring, kept, slopes):
    rows, visitors, scalars, met = kept
    marked = [(one, whole, slope) for one, whole, slope in zip((rows, visitors), met, slopes)]
    *values, scalars = ring.spread(ring.slopes, *marked, scalars=scalars, out=3)
    return (*(Rows(x, None) for x in values), scalars)


_meet.defvjp(_meet_forward, _meet_backward)


@dataclasses.dataclass(frozen=True)
class _Ring:
    score: Callable
    reduction: Reduction
    axes: tuple[str, ...]
    devices: int
    chunk: int | None
    elements: int
    columns: bool
    together: bool = False  # all visitors stop once, everywhere at a time

    def meetings(self, rows, visitors, scalars):
        """What `meet` returns, of each device's rows."""
        visitors = self.arrive(visitors)
        sides = self.sides(rows, visitors)
        (x, x_real), (y, y_real) = map(self.cut, (rows, visitors), sides)
        scalars, of, join = self.vary(scalars), self.reduction.of, self.reduction.join

        def nothing(tree):
            shape = jax.tree.leaves(tree)[0].shape[:2]
            return self.vary(jnp.full(shape, self.reduction.start, scalars[0].dtype))

        def visit(seen, visitors):
            y, y_real, column = visitors

            def tile(column, rows):
                x, x_real, row = rows
                logits = self.logits(_widened(x), _widened(y), (x_real, y_real), scalars)
                column = join(column, of(logits, axis=0)) if self.columns else None
                return column, join(row, of(logits, axis=1))

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
        if self.together and self.columns:  # of each device's own rows
            columns = self.reduction.share(columns, self.axes)
        return _rows(seen, rows), columns

    def slopes(self, rows, visitors, scalars):
        """Gradients for the values of each device's rows, of its visitors, and for the scalars.

        Both come as (rows, their numbers, these numbers' slopes)."""
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
                gx, gy, gs = self.tile_slopes(x, y, (x_real, y_real), scalars)
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

    def tile_slopes(self, x, y, real, scalars):
        """Gradients for a tile of rows, for one of visitors, and for the scalars."""
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
        """Of a tile of rows with one of visitors; those of padding are never."""
        logits = self.score(x, y, scalars)
        for here, axis in zip(real, (1, 0)):
            if here is not None:
                logits = jnp.where(jnp.expand_dims(here, axis), logits, NEVER)
        return logits

    def sides(self, rows, visitors) -> tuple[int, int]:
        """How many rows a tile holds, and how many visitors.

        Left to us, a tile's logits take as much memory as a device's rows, within bounds: beside
        these it does not count, and the larger the fewer cycles. By the TPU's compiler, 1,048,576
        rows of InfoNCE on 16 v5e chips: 12.1 G cycles and 833 MiB with tiles of 2**18, 6.0 G and
        897 with 2**20, 4.1 G and 898 with 2**22.
        """
        if self.chunk:
            return self.chunk, self.chunk
        least, most = _TILES
        held = (
            max(sum(x.size for x in jax.tree.leaves(one.values)) for one in (rows, visitors)) // 2
        )
        pairs = max(1, min(max(held, least), most) // self.elements)
        side = 2 ** (pairs.bit_length() // 2 - (pairs.bit_length() % 2 == 0))
        side = min(side, len(jax.tree.leaves(rows)[0]))
        return side, max(1, 2 ** (pairs.bit_length() - 1) // side)

    def cut(self, tree, side):
        """Tiles [count c ...] of a device's rows, and which of these are real; None: all are."""
        b = len(jax.tree.leaves(tree)[0])
        chunk = min(b, side)
        count = -(-b // chunk)
        chunk = chunk if self.chunk else -(-b // count)  # as even as can be
        cut = jax.tree.map(partial(split, count=count, chunk=chunk), tree)
        return cut, None if count * chunk == b else split(jnp.ones(b, bool), count, chunk)

    def arrive(self, visitors):
        return (
            jax.tree.map(partial(gather, axes=self.axes), visitors) if self.together else visitors
        )

    def round(self, stop, carry):
        """Every visitor stops at every device, and is then one before its own."""
        if not self.axes or self.together:
            return stop(carry, None)[0]
        return lax.scan(stop, carry, length=self.devices)[0]

    def send(self, tree):
        """From each device to the next."""
        if not self.axes or self.together:
            return tree
        turn = [(i, (i + 1) % self.devices) for i in range(self.devices)]
        return jax.tree.map(lambda x: lax.ppermute(x, self.axes, turn), tree)

    def spread(self, fn, *rows, scalars, out):
        """`fn(*rows, scalars)` on each device's rows. It returns `out` trees: rows, or in the third
        place scalars."""
        if not self.axes:
            return fn(*rows, scalars)
        specs = P(self.axes), P(self.axes), P()
        out = specs[:out] if out > 1 else specs[0]
        return jax.shard_map(fn, in_specs=specs, out_specs=out)(*rows, scalars)

    def vary(self, tree):
        """A scan's carry must be as device-varying going in as it is coming out."""
        return (
            jax.tree.map(lambda x: lax.pcast(x, self.axes, to="varying"), tree)
            if self.axes
            else tree
        )


def _rows(tree, like):
    """What tiles [count c ...] hold, without their padding: as many as `like` has."""
    b = len(jax.tree.leaves(like)[0])
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:b], tree)


def _widened(rows):
    return rows._replace(values=jax.tree.map(lambda x: x.astype(wide(x)), rows.values))


def _sum(a, b):
    return jax.tree.map(jnp.add, a, b)
