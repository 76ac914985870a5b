"""k-means on the devices: Lloyd's algorithm over rows that may be sharded over a mesh.

Inside `jax.set_mesh(...)` the rows are sharded over the batch axes, and only k x d sums travel.
Without a mesh the same code runs on one device. Rows meet centroids tile by tile, so memory grows
with n·d + k·d, and no n x k block exists.

Sums are taken in fixed point. Integers add up to the same bits in any order, so neither a GPU's
atomic additions nor the number of devices changes a centroid.

In a notebook, with a million rows and a progress bar that shows iteration and inertia:

    from clipx.ops import kmeans
    clusters = kmeans.fit(x, 20_000, key=jax.random.key(0), restarts=3, progress=True)
    clusters.assignment, clusters.centroids, clusters.inertia, clusters.counts

`x` may be a NumPy array or a memory map. The devices together must hold x and one copy of it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
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
from clipx.types import PyTree, batch_axes

_BETTER = 1 - 1e-6  # a later restart must win by more than rounding, which the topology changes
Axes = tuple[str, ...]  # mesh axes over which rows are sharded; () on one device
Init = Literal["random_rows", "kmeans++", "given"]
Progress = bool | Callable[[int, int, float, float], None]


class KMeans(NamedTuple):
    """The result of `fit`. `assignment`, `inertia` and `counts` come from a last assignment to the
    final `centroids`, so a centroid is not exactly its members' mean, and may have no members."""

    centroids: Float[Array, "k d"]
    assignment: Int32[Array, " n"]  # index of each row's nearest centroid; of equals the first
    inertia: Float[Array, ""]  # sum over rows of the squared distance to the nearest centroid
    counts: Int32[Array, " k"]  # rows per centroid


def fit(
    x: Float[Array | np.ndarray, "n d"],
    k: int,
    *,
    key: Array,
    iterations: int = 20,
    restarts: int = 1,
    init: Literal["random_rows", "kmeans++"] | Float[Array | np.ndarray, "k d"] = "random_rows",
    spherical: bool = False,
    chunk: int | None = None,
    progress: Progress = False,
) -> KMeans:
    """k centroids of the rows of x by Lloyd's algorithm in float32, and each row's nearest one.

    An iteration assigns all rows and moves each centroid to the mean of its members, until no
    centroid moves or `iterations` are done. Of `restarts` runs from different random starts, the
    run with the lowest inertia in its last iteration is kept, and all rows are assigned once more.
    NaN and infinite entries count as 0. The bits of the result are the same from run to run; on
    another number of devices they may differ where rounding decides which centroid is nearest.
    Inside `jax.jit`, everything but `x`, `key` and given centroids must be static.

    `init`: "random_rows" starts from k rows of x, chosen by `key`, n and the restart alone; two
      sets of n rows start from the same row numbers. "kmeans++" samples each centroid among the
      rows in proportion to the squared distance from the centroids so far, which takes k passes
      over the rows, one after the other. An array [k d] is the start itself, for one run.
    `spherical`: scales rows and, after each iteration, centroids to unit length. Zeros stay zeros.
    `chunk`: the number of rows per tile; None picks it.
    `progress`: True shows a bar. A callable gets (restart, iteration, inertia, seconds since the
      start), the first two counted from 0. The host then starts the iterations one by one, which is
      impossible inside `jax.jit`.

    A centroid without members becomes a copy of another centroid, sampled in proportion to its
    number of members less one. The two are scaled by 1 ± 1/1024 in alternate dimensions, and each
    counts half of the members. Source: faiss (Clustering.cpp), with whose defaults ProtoCLIP (arXiv
    2206.10996) clusters; faiss walks over the clusters until one accepts instead of sampling once.
    Raises `ConfigError` for an impossible shape, k, `init`, `iterations`, `restarts` or `chunk`.
    """
    plan, start, given = _check(x, k, iterations, restarts, init, spherical, chunk)
    if not progress:
        return _fit(plan, start, iterations, restarts, x, given, key)
    if any(isinstance(a, Tracer) for a in (x, key, given)):
        raise ConfigError(
            "kmeans.fit: progress", "a call inside jax.jit", "a call outside", "pass progress=False"
        )
    return _fit_from_host(plan, start, iterations, restarts, x, given, key, progress)


def _check(
    x: Array | np.ndarray,
    k: int,
    iterations: int,
    restarts: int,
    init: Literal["random_rows", "kmeans++"] | Array | np.ndarray,
    spherical: bool,
    chunk: int | None,
) -> tuple[Plan, Init, Array | np.ndarray | None]:
    """(the plan, the kind of `init`, given centroids or None); `ConfigError` for bad arguments."""

    def wrong(what: str, found: object, expected: str, fix: str = "") -> ConfigError:
        return ConfigError(f"kmeans.fit: {what}", str(found), expected, fix)

    if len(x.shape) != 2:
        raise wrong("x", f"shape {x.shape}", "rows [n d]")
    n, d = x.shape
    if not 1 <= k <= n:
        raise wrong("k", f"k={k} for n={n} rows", f"1 <= k <= n={n}", "fewer clusters or more rows")
    for what, number in (("iterations", iterations), ("restarts", restarts), ("chunk", chunk)):
        if number is not None and number < 1:
            raise wrong(what, number, "at least 1")
    start, given = "given", None
    if not isinstance(init, str):
        given = init
        if jnp.shape(init) != (k, d):
            raise wrong("init", f"centroids {jnp.shape(init)}", f"[k d] = ({k}, {d})")
        if restarts > 1:
            raise wrong("restarts", f"{restarts} with given centroids", "1: all would be the same")
    elif init not in ("random_rows", "kmeans++"):
        raise wrong("init", repr(init), "'random_rows', 'kmeans++' or centroids [k d]")
    else:
        start = init
    plan = make_plan(n, d, k, devices=_devices(), spherical=spherical, chunk=chunk)
    return plan, start, given


def _devices() -> int:
    return math.prod(jax.sharding.get_abstract_mesh().shape[a] for a in batch_axes())


def _spread(fn: Callable, in_specs: tuple[str, ...], out_specs: tuple[str, ...]) -> Callable:
    """`fn(axes, ...)` on each device's rows. A spec says "rows" (the row axis first) or
    "replicated"."""
    axes = batch_axes()
    if not axes:
        return partial(fn, ())
    specs = [tuple(P(axes) if s == "rows" else P() for s in x) for x in (in_specs, out_specs)]
    return jax.shard_map(partial(fn, axes), in_specs=specs[0], out_specs=specs[1])


def _over_devices(reduce: Callable, x: Array, axes: Axes) -> Array:
    return reduce(x, axes) if axes else x


def _first_row(axes: Axes, rows: Array) -> Array | int:
    return lax.axis_index(axes) * rows.shape[0] if axes else 0


def _prepare(plan: Plan, x: Array) -> tuple[Array, Array]:
    """(float32 rows, padded with zeros to full tiles on every device; for each column the exponent
    of a power of two above its values). The padding counts nowhere."""
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
    init: Init,
    rows: Float[Array, "m d"],
    given: Float[Array, "k d"] | None,
    key: Array,
) -> Float[Array, "k d"]:
    """The centroids that a run starts from. `rows` are the plan's n rows, followed by padding."""
    if init == "given":
        assert given is not None
        return unit(given.astype(jnp.float32)) if plan.spherical else given.astype(jnp.float32)
    specs = ("rows", "replicated"), ("replicated",)
    if init == "kmeans++":
        return _spread(partial(_plus_plus, plan), *specs)(rows, key)[0]
    chosen = jax.random.choice(key, plan.n, (plan.k,), replace=False).astype(jnp.int32)
    return _spread(_take, *specs)(rows, chosen)[0]


def _take(axes: Axes, rows: Array, chosen: Array) -> tuple[Array]:
    """The rows with the global numbers `chosen`, from whichever devices hold them."""
    index = chosen - _first_row(axes, rows)
    is_local = (index >= 0) & (index < rows.shape[0])
    taken = jnp.where(is_local[:, None], rows[jnp.clip(index, 0, rows.shape[0] - 1)], 0)
    return (_over_devices(lax.psum, taken, axes),)


def _plus_plus(plan: Plan, axes: Axes, rows: Array, key: Array) -> tuple[Array]:
    """k-means++: samples rows in proportion to their squared distance from the centroids so far. Of
    the times Exp(1) / distance² of all rows, the least wins."""
    index = _first_row(axes, rows) + jnp.arange(rows.shape[0], dtype=jnp.int32)

    def sample(distance: Array, step: Array | int) -> tuple[Array, Array]:
        step_key = jax.random.fold_in(key, step)  # then one key per row: the same on any topology
        time = jax.vmap(lambda i: jax.random.exponential(jax.random.fold_in(step_key, i)))(index)
        time = jnp.where((index < plan.n) & (distance > 0), time / distance, jnp.inf)
        first = _over_devices(lax.pmin, jnp.min(time), axes)
        winner = jnp.min(jnp.where((time == first) & (index < plan.n), index, plan.n))
        winner = _over_devices(lax.pmin, winner, axes)
        centroid = _take(axes, rows, winner[None])[0]
        new_distance = jnp.sum(jnp.square(rows - centroid), axis=1)
        return jnp.minimum(distance, new_distance), centroid[0]

    equal = jnp.ones_like(rows[:, 0])  # the first centroid is sampled uniformly
    _, first = sample(equal, 0)
    distance = jnp.sum(jnp.square(rows - first), axis=1)
    _, others = lax.scan(sample, distance, jnp.arange(1, plan.k, dtype=jnp.int32))
    return (jnp.concatenate([first[None], others]),)


def _sweep(plan: Plan, rows: Array, exponent: Array, centroids: Array) -> tuple[Array, ...]:
    """One assignment of all rows: (assignment, squared distances, sums in fixed point, counts)."""

    def local(axes: Axes, rows: Array, exponent: Array, centroids: Array) -> tuple[Array, ...]:
        index = _first_row(axes, rows) + jnp.arange(rows.shape[0], dtype=jnp.int32)

        def tile(carry: PyTree, x: PyTree) -> tuple[PyTree, tuple[Array, Array]]:
            rows, index = x
            nearest = nearest_centroid(plan, rows, centroids)
            distance = jnp.sum(jnp.square(rows - centroids[nearest]), axis=1)
            valid = index < plan.n
            sums = carry[0].at[nearest].add(to_fixed(plan, rows, exponent))
            counts = carry[1].at[nearest].add(valid.astype(jnp.int32))
            return (sums, counts), (nearest, jnp.where(valid, distance, 0))

        sums = jnp.zeros((plan.k, plan.limbs * rows.shape[1]), jnp.int32)
        carry = sums, jnp.zeros(plan.k, jnp.int32)
        if axes:  # shard_map wants a scan's first carry to be as device-varying as its last
            carry = lax.pcast(carry, axes, to="varying")
        tiles = [a.reshape(-1, plan.rows, *a.shape[1:]) for a in (rows, index)]
        carry, out = lax.scan(tile, carry, tuple(tiles))
        nearest, distance = (a.reshape(-1) for a in out)
        return nearest, distance, *(_over_devices(lax.psum, a, axes) for a in carry)

    spread = _spread(
        local, ("rows", "replicated", "replicated"), ("rows", "rows", "replicated", "replicated")
    )
    return spread(rows, exponent, centroids)


def _step(
    plan: Plan, rows: Array, exponent: Array, centroids: Array, key: Array
) -> tuple[Array, Array]:
    """(the centroids after one iteration, the inertia of its assignment)."""
    _, distance, sums, counts = _sweep(plan, rows, exponent, centroids)
    moved = from_fixed(plan, sums, exponent) / jnp.maximum(counts, 1)[:, None]
    moved = jnp.where(counts[:, None] > 0, moved, centroids)
    moved = split_empty(moved, counts.astype(jnp.float32), key)
    return (unit(moved) if plan.spherical else moved), jnp.sum(distance)


def _last(plan: Plan, rows: Array, exponent: Array, centroids: Array) -> KMeans:
    nearest, distance, _, counts = _sweep(plan, rows, exponent, centroids)
    return KMeans(centroids, nearest[: plan.n], jnp.sum(distance), counts)


def _keys(key: Array, restart: Array | int) -> Array:
    """Two keys of a run: for its start, and for its iterations, which fold in their number."""
    return jax.random.split(jax.random.fold_in(key, restart))


@partial(jax.jit, static_argnums=(0, 1))
def _fit(
    plan: Plan, init: Init, iterations: int, runs: int, x: Array, given: Array | None, key: Array
) -> KMeans:
    rows, exponent = _prepare(plan, x)

    def run(r: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
        start, splits = _keys(key, r)

        def step(state: PyTree) -> PyTree:
            i, centroids, _, _ = state
            step_key = jax.random.fold_in(splits, i)
            moved, inertia = _step(plan, rows, exponent, centroids, step_key)
            return i + 1, moved, inertia, jnp.any(moved != centroids)

        def goes_on(state: PyTree) -> Array:
            return (state[0] < iterations) & state[3]

        first = jnp.int32(0), start_centroids(plan, init, rows, given, start), jnp.float32(0), True
        last = lax.while_loop(goes_on, step, first)[1:3]  # centroids, inertia
        better = (last[1] < best[1] * _BETTER) | (r == 0)
        return jax.tree.map(lambda new, old: jnp.where(better, new, old), last, best)

    none = jnp.zeros((plan.k, x.shape[1]), jnp.float32), jnp.float32(jnp.inf)
    centroids, _ = lax.fori_loop(0, runs, run, none)
    return _last(plan, rows, exponent, centroids)


_jit_prepare = jax.jit(_prepare, static_argnums=0)
_jit_start = jax.jit(start_centroids, static_argnums=(0, 1))
_jit_step = jax.jit(_step, static_argnums=0)
_jit_last = jax.jit(_last, static_argnums=0)


def _fit_from_host(
    plan: Plan,
    init: Init,
    iterations: int,
    restarts: int,
    x: Array | np.ndarray,
    given: Array | np.ndarray | None,
    key: Array,
    progress: Progress,
) -> KMeans:
    """`_fit` with one program per iteration, so that the host can report progress in between."""
    began = time.perf_counter()
    rows, exponent = _jit_prepare(plan, x)
    bar = tqdm(total=restarts * iterations, desc=f"k-means, k={plan.k}", disable=callable(progress))
    best, inertia = (None, math.inf), math.inf
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
