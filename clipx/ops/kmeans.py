"""k-means on the devices: Lloyd's algorithm over rows that may be spread over a mesh.

Inside `jax.set_mesh(...)` the rows are spread over the batch axes and only k x d sums travel;
without a mesh the same code runs on one device. Rows meet centroids tile by tile, so that memory
grows with n*d + k*d and no n x k block is ever held.

Sums are taken in fixed point. Integers add up to the same bits in any order, so neither a GPU's
atomic additions nor the number of devices changes a centroid.

In a notebook, with a million rows and a bar that shows iteration and inertia:

    from clipx.ops import kmeans
    found = kmeans.fit(x, 20_000, key=jax.random.key(0), restarts=3, progress=True)
    found.assignment, found.centroids, found.inertia, found.counts

`x` may be a NumPy array, a memory map too; it and one copy of it must fit on the devices together.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int32
from tqdm import tqdm

from clipx.errors import ConfigError
from clipx.ops.lloyd import (
    Plan,
    from_fixed,
    make_plan,
    nearest_centroid,
    split_empty,
    to_fixed,
    unit,
)
from clipx.types import batch_axes

_BETTER = 1 - 1e-6  # a later restart must win by more than rounding, which the topology decides


class KMeans(NamedTuple):
    """What `fit` found. `assignment`, `inertia` and `counts` are of one assignment to `centroids`,
    which are therefore not exactly their members' means, and some may have none."""

    centroids: Float[Array, "k d"]
    assignment: Int32[Array, " n"]  # the nearest centroid; of equally near ones the first
    inertia: Float[Array, ""]  # sum of squared distances to it
    counts: Int32[Array, " k"]


def fit(
    x: Float[Array, "n d"],
    k: int,
    *,
    key: Array,
    iterations: int = 20,
    restarts: int = 1,
    init: Literal["random_rows", "kmeans++"] | Float[Array, "k d"] = "random_rows",
    spherical: bool = False,
    chunk: int | None = None,
    progress: bool | Callable[[int, int, float, float], None] = False,
) -> KMeans:
    """k centroids of the rows of x by Lloyd's algorithm in float32, and each row's nearest.

    Every iteration assigns all rows and moves each centroid to its members' mean, until none moves
    or `iterations` are done; of `restarts` runs, each from another draw, the one whose last
    iteration had the lowest inertia is kept, and all rows are assigned once more. NaN and infinite
    entries count as 0. The result is the same bits from run to run; on another number of devices it
    may differ where two centroids are equally near a row but for rounding. It can be called inside
    `jax.jit`, with all but `x`, `key` and given centroids static.

    `init`: "random_rows" takes k of them, a function of `key`, n and the restart alone, so that two
    sets of n rows start from the same places; "kmeans++" draws each centroid among the rows in
    proportion to the squared distance from those already drawn, at the cost of k passes over the
    rows, one after the other; or the centroids [k d] themselves, for one run.
    `spherical` scales rows and, after each iteration, centroids to unit length; zeros stay zeros.
    `chunk` is the number of rows a tile holds; None picks it. `progress` shows a bar or, if
    callable, is called as (restart, iteration, inertia, seconds since the start), both from 0; the
    iterations are then started one by one, which only a call outside `jax.jit` can do.

    A centroid without members becomes a copy of one drawn in proportion to its members less one,
    the two are scaled by 1 ± 1/1024 in alternate dimensions and each is counted with half of the
    members. Source: faiss (Clustering.cpp), whose defaults ProtoCLIP (arXiv 2206.10996) clusters
    with; faiss walks over the clusters until one accepts, which is here one draw.
    Raises `ConfigError` for a k, `init` or number that cannot be.
    """
    plan, given = _check(x, k, iterations, restarts, init, spherical, chunk)
    name = init if given is None else "given"
    if not progress:
        return _fit(plan, name, iterations, restarts, x, given, key)
    if any(isinstance(a, jax.core.Tracer) for a in (x, key, given)):
        raise ConfigError(
            "kmeans.fit: progress", "a call inside jax.jit", "a call outside", "progress=False"
        )
    return _fit_from_host(plan, name, iterations, restarts, x, given, key, progress)


def _check(x, k, iterations, restarts, init, spherical, chunk):
    """(the plan, the given centroids or None). Raises `ConfigError` for what cannot be."""

    def wrong(what, found, expected, fix=""):
        return ConfigError(f"kmeans.fit: {what}", str(found), expected, fix)

    if len(x.shape) != 2:
        raise wrong("x", f"shape {x.shape}", "rows [n d]")
    n, d = x.shape
    if not 1 <= k <= n:
        raise wrong("k", f"k={k} for n={n} rows", f"1 <= k <= n={n}", "fewer clusters or more rows")
    for what, number in (("iterations", iterations), ("restarts", restarts), ("chunk", chunk)):
        if number is not None and number < 1:
            raise wrong(what, number, "at least 1")
    given = None
    if not isinstance(init, str):
        given = init
        if jnp.shape(init) != (k, d):
            raise wrong("init", f"centroids {jnp.shape(init)}", f"[k d] = ({k}, {d})")
        if restarts > 1:
            raise wrong("restarts", f"{restarts} with given centroids", "1: all would be the same")
    elif init not in ("random_rows", "kmeans++"):
        raise wrong("init", repr(init), "'random_rows', 'kmeans++' or centroids [k d]")
    plan = make_plan(n, d, k, devices=_devices(), spherical=spherical, chunk=chunk)
    return plan, given


def _devices() -> int:
    return math.prod(jax.sharding.get_abstract_mesh().shape[a] for a in batch_axes())


def _spread(fn, in_specs, out_specs):
    """`fn(axes, ...)` on each device's rows; "rows" in a spec stands for an array that has them."""
    axes = batch_axes()
    if not axes:
        return partial(fn, ())
    specs = [tuple(P(axes) if s == "rows" else P() for s in x) for x in (in_specs, out_specs)]
    return jax.shard_map(partial(fn, axes), in_specs=specs[0], out_specs=specs[1])


def _over_devices(reduce, x, axes):
    return reduce(x, axes) if axes else x


def _first_row(axes, rows):
    return lax.axis_index(axes) * rows.shape[0] if axes else 0


def _prepare(plan, x):
    """(float32 rows, exponents): rows padded with zeros to full tiles on every device, and for each
    column the exponent of a power of two above its values. Padding is counted nowhere."""
    x = jnp.asarray(x, jnp.float32)
    x = jnp.where(jnp.isfinite(x), x, 0)
    if plan.spherical:
        x = unit(x)
    x = jnp.pad(x, ((0, -plan.n % (_devices() * plan.rows)), (0, 0)))
    if batch_axes():
        x = lax.with_sharding_constraint(x, P(batch_axes()))
    largest = jnp.max(jnp.abs(x), axis=0)
    return x, jnp.maximum(jnp.frexp(largest)[1], -96)  # below, its inverse would overflow


def start_centroids(
    plan: Plan,
    init: Literal["random_rows", "kmeans++", "given"],
    rows: Float[Array, "m d"],
    given: Float[Array, "k d"] | None,
    key: Array,
) -> Float[Array, "k d"]:
    """The centroids that a run starts from; with "given", the `given` ones.

    `rows` are the plan's n rows, and padding after them.
    """
    if init == "given":
        return unit(given.astype(jnp.float32)) if plan.spherical else given.astype(jnp.float32)
    if init == "kmeans++":
        return _spread(partial(_plus_plus, plan), ("rows", "replicated"), ("replicated",))(
            rows, key
        )[0]
    chosen = jax.random.choice(key, plan.n, (plan.k,), replace=False).astype(jnp.int32)
    return _spread(_take, ("rows", "replicated"), ("replicated",))(rows, chosen)[0]


def _take(axes, rows, chosen):
    place = chosen - _first_row(axes, rows)
    here = (place >= 0) & (place < rows.shape[0])
    found = jnp.where(here[:, None], rows[jnp.clip(place, 0, rows.shape[0] - 1)], 0)
    return (_over_devices(lax.psum, found, axes),)


def _plus_plus(plan, axes, rows, key):
    """Draws by squared distance: of times Exp(1) / distance² of each row, the least wins."""
    place = _first_row(axes, rows) + jnp.arange(rows.shape[0], dtype=jnp.int32)

    def draw(distance, step):
        step_key = jax.random.fold_in(key, step)  # then one per row: the same on any topology
        time = jax.vmap(lambda i: jax.random.exponential(jax.random.fold_in(step_key, i)))(place)
        time = jnp.where((place < plan.n) & (distance > 0), time / distance, jnp.inf)
        first = _over_devices(lax.pmin, jnp.min(time), axes)
        winner = jnp.min(jnp.where((time == first) & (place < plan.n), place, plan.n))
        winner = _over_devices(lax.pmin, winner, axes)
        centroid = _take(axes, rows, winner[None])[0]
        near = jnp.sum(jnp.square(rows - centroid), axis=1)
        return jnp.minimum(distance, near), centroid[0]

    alike = jnp.ones_like(rows[:, 0])  # the first is drawn evenly
    near, first = draw(alike, 0)
    near = jnp.sum(jnp.square(rows - first), axis=1)
    _, others = lax.scan(draw, near, jnp.arange(1, plan.k, dtype=jnp.int32))
    return (jnp.concatenate([first[None], others]),)


def _sweep(plan, rows, exponent, centroids):
    """One assignment of all rows: (assignment, squared distances, sums in fixed point, counts)."""

    def local(axes, rows, exponent, centroids):
        place = _first_row(axes, rows) + jnp.arange(rows.shape[0], dtype=jnp.int32)

        def tile(carry, x):
            rows, place = x
            nearest = nearest_centroid(plan, rows, centroids)
            distance = jnp.sum(jnp.square(rows - centroids[nearest]), axis=1)
            valid = place < plan.n
            sums = carry[0].at[nearest].add(to_fixed(plan, rows, exponent))
            counts = carry[1].at[nearest].add(valid.astype(jnp.int32))
            return (sums, counts), (nearest, jnp.where(valid, distance, 0))

        sums = jnp.zeros((plan.k, plan.limbs * rows.shape[1]), jnp.int32)
        carry = sums, jnp.zeros(plan.k, jnp.int32)
        if axes:  # a scan's carry must be as device-varying going in as it is coming out
            carry = lax.pcast(carry, axes, to="varying")
        tiles = [a.reshape(-1, plan.rows, *a.shape[1:]) for a in (rows, place)]
        carry, out = lax.scan(tile, carry, tuple(tiles))
        nearest, distance = (a.reshape(-1) for a in out)
        return nearest, distance, *(_over_devices(lax.psum, a, axes) for a in carry)

    spread = _spread(
        local, ("rows", "replicated", "replicated"), ("rows", "rows", "replicated", "replicated")
    )
    return spread(rows, exponent, centroids)


def _step(plan, rows, exponent, centroids, key):
    """The centroids after one iteration, and the inertia of its assignment."""
    _, distance, sums, counts = _sweep(plan, rows, exponent, centroids)
    moved = from_fixed(plan, sums, exponent) / jnp.maximum(counts, 1)[:, None]
    moved = jnp.where(counts[:, None] > 0, moved, centroids)
    moved = split_empty(moved, counts.astype(jnp.float32), key)
    return (unit(moved) if plan.spherical else moved), jnp.sum(distance)


def _last(plan, rows, exponent, centroids):
    nearest, distance, _, counts = _sweep(plan, rows, exponent, centroids)
    return KMeans(centroids, nearest[: plan.n], jnp.sum(distance), counts)


def _keys(key, restart):
    """A key for the start of a run, and one into which its iterations fold their number."""
    return jax.random.split(jax.random.fold_in(key, restart))


@partial(jax.jit, static_argnums=(0, 1))
def _fit(plan, init, iterations, restarts, x, given, key):
    rows, exponent = _prepare(plan, x)

    def restart(r, best):
        start, splits = _keys(key, r)

        def step(state):
            i, centroids, _, _ = state
            step_key = jax.random.fold_in(splits, i)
            moved, inertia = _step(plan, rows, exponent, centroids, step_key)
            return i + 1, moved, inertia, jnp.any(moved != centroids)

        def goes_on(state):
            return (state[0] < iterations) & state[3]

        first = jnp.int32(0), start_centroids(plan, init, rows, given, start), jnp.float32(0), True
        found = lax.while_loop(goes_on, step, first)[1:3]
        better = (found[1] < best[1] * _BETTER) | (r == 0)
        return jax.tree.map(lambda new, old: jnp.where(better, new, old), found, best)

    none = jnp.zeros((plan.k, x.shape[1]), jnp.float32), jnp.float32(jnp.inf)
    centroids, _ = lax.fori_loop(0, restarts, restart, none)
    return _last(plan, rows, exponent, centroids)


_jit_prepare = jax.jit(_prepare, static_argnums=0)
_jit_start = jax.jit(start_centroids, static_argnums=(0, 1))
_jit_step = jax.jit(_step, static_argnums=0)
_jit_last = jax.jit(_last, static_argnums=0)


def _fit_from_host(plan, init, iterations, restarts, x, given, key, progress):
    """As `_fit`, with a program for each iteration, so that the host can report in between."""
    began = time.perf_counter()
    rows, exponent = _jit_prepare(plan, x)
    bar = tqdm(total=restarts * iterations, desc=f"k-means, k={plan.k}", disable=callable(progress))
    best = None, math.inf
    with bar:
        for r in range(restarts):
            start, splits = _keys(key, r)
            centroids = _jit_start(plan, init, rows, given, start)
            for i in range(iterations):
                step_key = jax.random.fold_in(splits, i)
                last = centroids
                centroids, inertia = _jit_step(plan, rows, exponent, last, step_key)
                inertia = float(inertia)
                bar.set_postfix(restart=r, iteration=i, inertia=f"{inertia:.6g}", refresh=False)
                bar.update()
                if callable(progress):
                    progress(r, i, inertia, time.perf_counter() - began)
                if not jnp.any(centroids != last):
                    break
            if r == 0 or inertia < best[1] * _BETTER:
                best = centroids, inertia
    return _jit_last(plan, rows, exponent, best[0])
