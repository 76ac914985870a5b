"""Pairwise reductions with hand-written gradients: the forms "ring" and "assembly".

Ring: each device keeps its rows. The rows of the other tower, called visitors, travel from device
to device. At each stop every row meets every visitor, tile by tile, and both keep a running result.
The backward pass sends the visitors round again, with their results and their gradients so far, and
recomputes each tile. So memory does not grow with the rows of other devices. On one device nothing
travels.

Assembly: each device gathers all visitors at once. The gradients of the visitors are summed over
devices and scattered. This costs memory and saves the stops.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Float

from clipx.losses.pairwise import NEVER, Rows, narrow, narrow_product, wide
from clipx.losses.reductions import LARGEST, Reduction
from clipx.losses.tiles import Axes, check_spread, gather, scan, size, split
from clipx.types import Array, PyTree, batch_axes

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
    """(one result per row, one result per visitor): the `reduction` of the logits of all pairs.

    `score(rows, visitors, scalars)` returns the logits [c t] of a tile of rows and a tile of
    visitors. It gets `values` in float32 at least and `constants` as they are, and marks excluded
    pairs with `NEVER`. `elements` is how many numbers it computes per pair. Without `columns` the
    visitors' results are None. `chunk` is the number of rows, and of visitors, per tile; None picks
    it. Call it in the global view, with the rows of all devices.

    Raises `ValueError` if the number of devices does not divide the rows or the visitors.
    """
    axes = batch_axes()
    for one in (rows, visitors):
        if axes:
            check_spread(len(jax.tree.leaves(one)[0]), axes)
    together = form == "assembly" and bool(axes)
    ring = _Ring(score, reduction, axes, size(axes), chunk, elements, columns, together)
    return _reduce(ring, rows, visitors, scalars)


def mix(
    weigh: Callable, rows: Rows, visitors: Rows, *, chunk: int | None = None
) -> Float[Array, "b d"]:
    """Sums of the visitors' values [t d], weighted per row; float32 at least.

    `weigh(rows, visitors)` returns the weights [c t] of a tile. Weights of padding have no effect,
    because the values of padding are 0. No gradient flows.
    """
    axes = batch_axes()
    ring = _Ring(None, LARGEST, axes, size(axes), chunk, 1, False)

    def local(rows: Rows, visitors: Rows, scalars: tuple) -> Array:
        sides = ring.sides(visitors, visitors)
        (x, _), (y, _) = map(ring.cut, (rows, visitors), sides)
        count, c = jax.tree.leaves(x)[0].shape[:2]
        values = visitors.values

        def visit(total: Array, y: Rows) -> tuple[Array, None]:
            def tile(_: None, rows: tuple[Rows, Array]) -> tuple[None, Array]:
                x, total = rows
                highest = lax.Precision.HIGHEST
                weights, table = weigh(x, y), y.values.astype(wide(values))
                return None, total + jnp.einsum("ct,td->cd", weights, table, precision=highest)

            return scan(tile, None, (x, total))[1], None

        def stop(carry: tuple[Rows, Array], _: None) -> tuple[tuple[Rows, Array], None]:
            y, total = carry
            return (ring.send(y), scan(visit, total, y)[0]), None

        total = ring.vary(jnp.zeros((count, c, values.shape[1]), wide(values)))
        return _rows(ring.round(stop, (y, total))[1], rows)

    return ring.spread(local, *lax.stop_gradient((rows, visitors)), scalars=(), out=1)


def matches(
    a: Float[Array, "b d"], b: Float[Array, "b d"], *, chunk: int | None = None
) -> Float[Array, " b"]:
    """The product of each row of a with its match, to the bit as in a tile that holds both."""
    axes = batch_axes()
    ring = _Ring(None, LARGEST, axes, size(axes), chunk, 1, False)

    def diagonal(tiles: tuple[Array, Array]) -> Array:
        return jnp.diagonal(narrow_product(*(x.astype(wide(x)) for x in tiles), narrow(a)))

    def local(a: Array, b: Array, _: tuple) -> Array:
        side = min(ring.sides(Rows(a), Rows(b)))
        return _rows(lax.map(diagonal, (ring.cut(a, side)[0], ring.cut(b, side)[0])), a)

    return ring.spread(local, a, b, scalars=(), out=1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _reduce(ring: _Ring, rows: Rows, visitors: Rows, scalars: tuple) -> Any:
    return ring.spread(ring.reduce, rows, visitors, scalars=scalars, out=2)


def _reduce_forward(
    ring: _Ring, rows: Rows, visitors: Rows, scalars: tuple
) -> tuple[PyTree, PyTree]:
    results = _reduce(ring, rows, visitors, scalars)
    return results, (rows, visitors, scalars, results)


def _reduce_backward(ring: _Ring, residuals: PyTree, slopes: PyTree) -> tuple[Rows, Rows, PyTree]:
    rows, visitors, scalars, results = residuals
    x, y = zip((rows, visitors), results, slopes)
    dx, dy, ds = ring.spread(ring.gradients, x, y, scalars=scalars, out=3)
    return Rows(dx, None), Rows(dy, None), ds


_reduce.defvjp(_reduce_forward, _reduce_backward)


@dataclasses.dataclass(frozen=True)
class _Ring:
    """The static part of a reduction. Its methods run on the rows of one device."""

    score: Callable | None  # None if only rows travel, and nothing is reduced
    reduction: Reduction
    axes: Axes
    devices: int
    chunk: int | None
    elements: int
    columns: bool
    together: bool = False  # an assembly: all visitors are gathered

    def reduce(self, rows: Rows, visitors: Rows, scalars: tuple) -> tuple[PyTree, PyTree]:
        """The results of `pairwise_reduce` for the rows and the visitors of one device."""
        visitors = self.arrive(visitors)
        sides = self.sides(rows, visitors)
        (x, x_real), (y, y_real) = map(self.cut, (rows, visitors), sides)
        scalars, reduce, join = self.vary(scalars), self.reduction.reduce, self.reduction.join

        def start_results(tiles: PyTree) -> Array:
            shape = jax.tree.leaves(tiles)[0].shape[:2]
            return self.vary(jnp.full(shape, self.reduction.start, scalars[0].dtype))

        def visit(seen: PyTree, visitors: PyTree) -> tuple[PyTree, PyTree]:
            y, y_real, column = visitors

            def tile(column: PyTree, rows: PyTree) -> tuple[PyTree, Array]:
                x, x_real, row = rows
                logits = self.logits(_widened(x), _widened(y), (x_real, y_real), scalars)
                column = join(column, reduce(logits, axis=0)) if self.columns else None
                return column, join(row, reduce(logits, axis=1))

            column, seen = scan(tile, column, (x, x_real, seen))
            return seen, column

        def stop(carry: PyTree, _: None) -> tuple[PyTree, None]:
            y, seen, columns = carry
            away, columns = self.send(y), self.send(columns)
            here = start_results(y) if self.columns else None
            seen, here = scan(visit, seen, (y, y_real, here))
            return (away, seen, join(columns, here) if self.columns else None), None

        start = y, start_results(x), start_results(y) if self.columns else None
        _, seen, columns = self.round(stop, start)
        columns = _rows(self.send(columns), visitors)
        if self.together and self.columns:  # each device keeps the results of its own visitors
            assert self.reduction.share is not None
            columns = self.reduction.share(columns, self.axes)
        return _rows(seen, rows), columns

    def gradients(self, rows: PyTree, visitors: PyTree, scalars: tuple) -> tuple[PyTree, ...]:
        """Gradients by the values of one device's rows, by those of its visitors, by the scalars.

        `rows` and `visitors` are triples: `Rows`, their results, and the gradients by the results.
        """
        visitors = self.arrive(visitors)
        sides = self.sides(rows[0], visitors[0])
        (x, x_real), (y, y_real) = map(self.cut, (rows, visitors), sides)
        scalars = self.vary(scalars)

        def zeros(tree: PyTree) -> PyTree:
            return self.vary(jax.tree.map(lambda x: jnp.zeros(x.shape, wide(x)), tree))

        def visit(carry: PyTree, visitors: PyTree) -> tuple[PyTree, PyTree]:
            y, y_real = visitors

            def tile(carry: PyTree, rows: PyTree) -> tuple[PyTree, None]:
                dx, dy, ds = carry
                i, x, x_real = rows
                gx, gy, gs = self.tile_gradients(x, y, (x_real, y_real), scalars)
                dx = jax.tree.map(lambda d, g: d.at[i].add(g), dx, gx)
                return (dx, _sum(dy, gy), _sum(ds, gs)), None

            (dx, ds), dy = carry, zeros(y[0].values)
            numbers = jnp.arange(len(jax.tree.leaves(x)[0]))
            (dx, dy, ds), _ = scan(tile, (dx, dy, ds), (numbers, x, x_real))
            return (dx, ds), dy

        def stop(carry: PyTree, _: None) -> tuple[PyTree, None]:
            y, dx, dy, ds = carry
            away, dy = self.send(y), self.send(dy)  # while this stop's gradients are computed
            (dx, ds), here = scan(visit, (dx, ds), (y, y_real))
            return (away, dx, _sum(dy, here), ds), None

        start = y, zeros(x[0].values), zeros(y[0].values), zeros(scalars)
        _, dx, dy, ds = self.round(stop, start)
        dx, dy = (_rows(d, one) for d, one in ((dx, rows), (self.send(dy), visitors)))
        if self.together:
            dy = jax.tree.map(lambda x: lax.psum_scatter(x, self.axes, tiled=True), dy)
        dx, dy = (
            jax.tree.map(lambda d, x: d.astype(x.dtype), d, one[0].values)
            for d, one in ((dx, rows), (dy, visitors))
        )
        return dx, dy, lax.psum(ds, self.axes) if self.axes else ds

    def tile_gradients(self, x: PyTree, y: PyTree, real: tuple, scalars: tuple) -> PyTree:
        """Gradients by the values of a tile of rows, of a tile of visitors, and by the scalars."""
        (x, result, slope), (y, column_result, column_slope) = x, y
        reduction_slope = self.reduction.slope
        assert reduction_slope is not None

        def tile_logits(x_values: PyTree, y_values: PyTree, scalars: tuple) -> Array:
            ours, theirs = x._replace(values=x_values), y._replace(values=y_values)
            return self.logits(ours, theirs, real, scalars)

        x, y = _widened(x), _widened(y)
        logits, pull = jax.vjp(tile_logits, x.values, y.values, scalars)
        each = slope[:, None] * reduction_slope(logits, result[:, None])
        if self.columns:
            each += column_slope * reduction_slope(logits, column_result)
        return pull(each)

    def logits(self, x: Rows, y: Rows, real: tuple, scalars: tuple) -> Array:
        """The logits of a tile of rows and a tile of visitors; `NEVER` for padding."""
        assert self.score is not None
        logits = self.score(x, y, scalars)
        for is_real, axis in zip(real, (1, 0)):
            if is_real is not None:
                logits = jnp.where(jnp.expand_dims(is_real, axis), logits, NEVER)
        return logits

    def sides(self, rows: Rows, visitors: Rows) -> tuple[int, int]:
        """(rows per tile, visitors per tile).

        Without `chunk` a tile's logits take as much memory as a device's rows, within `TILES`. That
        is little beside the rows, and larger tiles take fewer cycles. Estimates of the TPU compiler
        for 1,048,576 rows of InfoNCE on 16 v5e chips: 12.1 G cycles and 833 MiB with tiles of
        2**18, 6.0 G and 897 MiB with 2**20, 4.1 G and 898 MiB with 2**22.
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

    def cut(self, tree: PyTree, side: int) -> tuple[PyTree, Array | None]:
        """(tiles [count c ...] of a device's rows, mask of the rows that are not padding).

        The mask is None if there is no padding.
        """
        b = len(jax.tree.leaves(tree)[0])
        chunk = min(b, side)
        count = -(-b // chunk)
        chunk = chunk if self.chunk else -(-b // count)  # spread the padding over all tiles
        cut = jax.tree.map(partial(split, count=count, chunk=chunk), tree)
        return cut, None if count * chunk == b else split(jnp.ones(b, bool), count, chunk)

    def arrive(self, visitors: PyTree) -> PyTree:
        """The visitors of a device's first stop: its own in a ring, all in an assembly."""
        return (
            jax.tree.map(partial(gather, axes=self.axes), visitors) if self.together else visitors
        )

    def round(self, stop: Callable, carry: PyTree) -> PyTree:
        """Runs `stop` once per device of the ring, which leaves visitors one `send` from home."""
        if not self.axes or self.together:
            return stop(carry, None)[0]
        return lax.scan(stop, carry, length=self.devices)[0]

    def send(self, tree: PyTree) -> PyTree:
        """Sends arrays from each device to the next."""
        if not self.axes or self.together:
            return tree
        turn = [(i, (i + 1) % self.devices) for i in range(self.devices)]
        return jax.tree.map(lambda x: lax.ppermute(x, self.axes, turn), tree)

    def spread(self, fn: Callable, *rows: PyTree, scalars: tuple, out: int) -> PyTree:
        """Calls `fn(*rows, scalars)` on the rows of each device.

        `fn` returns `out` trees. The first two have the row axis first; the third is replicated.
        """
        if not self.axes:
            return fn(*rows, scalars)
        specs = P(self.axes), P(self.axes), P()
        out_specs = specs[:out] if out > 1 else specs[0]
        return jax.shard_map(fn, in_specs=specs, out_specs=out_specs)(*rows, scalars)

    def vary(self, tree: PyTree) -> PyTree:
        """The tree marked as device-varying, which a scan's carry must be from the start."""
        return (
            jax.tree.map(lambda x: lax.pcast(x, self.axes, to="varying"), tree)
            if self.axes
            else tree
        )


def _rows(tiles: PyTree, like: PyTree) -> PyTree:
    """The rows of tiles [count c ...] without the padding: as many rows as `like` has."""
    b = len(jax.tree.leaves(like)[0])
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:b], tiles)


def _widened(rows: Rows) -> Rows:
    return rows._replace(values=jax.tree.map(lambda x: x.astype(wide(x)), rows.values))


def _sum(a: PyTree, b: PyTree) -> PyTree:
    return jax.tree.map(jnp.add, a, b)
