"""The parts of Lloyd's algorithm that run on one device: tiles, fixed point, empty clusters.

`clipx.ops.kmeans` calls them, and handles everything across devices.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

_SPLIT = 1 / 1024  # relative distance between the halves of a split cluster
# By backend: the most (elements, centroids) of a tile of rows x centroids. A CPU's tile fits the
# cache of a core; an accelerator's tile is large enough to keep it busy.
TILES = {"cpu": (2**18, 2**10)}
_LARGE_TILE = (2**25, 2**13)


class Plan(NamedTuple):
    """The static settings of a clustering of n rows by k centroids."""

    n: int
    k: int
    rows: int  # rows per tile
    columns: int  # centroids per tile
    bits: int  # bits per limb of a fixed-point sum
    spherical: bool

    @property
    def limbs(self) -> int:
        """Limbs (int32 numbers) per fixed-point value."""
        return -(-24 // self.bits)

    @property
    def precision(self) -> int:
        """Bits kept of a column's largest value, at least the 24 of a float32."""
        return min(30, self.bits * self.limbs)


def make_plan(
    n: int, d: int, k: int, *, devices: int = 1, spherical: bool = False, chunk: int | None = None
) -> Plan:
    """The plan for rows [n d] that are sharded over `devices`.

    `chunk` is the most rows per tile; None picks it. All tiles have the same number of rows, chosen
    so that little padding is needed.
    """
    bits = min(15, 31 - n.bit_length())  # the sum of n limbs stays below 2**31
    tile, columns = TILES.get(jax.default_backend(), _LARGE_TILE)
    columns = -(-k // -(-k // columns))
    plan = Plan(n, k, 1, columns, bits, spherical)
    rows = chunk or max(1, tile // max(columns, plan.limbs * d))
    per_device = -(-n // devices)
    return plan._replace(rows=-(-per_device // -(-per_device // rows)))


def unit(x: Float[Array, "n d"]) -> Float[Array, "n d"]:
    """Rows scaled to length 1; zeros stay zeros."""
    return x / jnp.maximum(jnp.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def nearest_centroid(
    plan: Plan, rows: Float[Array, "b d"], centroids: Float[Array, "k d"]
) -> Int32[Array, " b"]:
    """The index of the nearest centroid of each row of a tile; the first of equally near ones.

    The nearest centroid c of a row x has the largest x·c - |c|²/2. The code takes a maximum and
    then the index of the maximum, because a CPU vectorises these two passes but not an argmax.
    """
    tiles = -(-plan.k // plan.columns)
    pad = tiles * plan.columns - plan.k
    half = 0.5 * jnp.sum(jnp.square(centroids), axis=1)
    half = jnp.pad(half, (0, pad), constant_values=jnp.inf).reshape(tiles, plan.columns)
    centroids = jnp.pad(centroids, ((0, pad), (0, 0))).reshape(tiles, plan.columns, -1)

    def visit(best: tuple[Array, Array], tile: tuple[Array, ...]) -> tuple[tuple, None]:
        centroids, half, first = tile
        score = jnp.matmul(centroids, rows.T, precision=lax.Precision.HIGHEST) - half[:, None]
        top = jnp.max(score, axis=0)
        index = first + jnp.arange(plan.columns, dtype=jnp.int32)[:, None]
        index = jnp.min(jnp.where(score == top, index, plan.k - 1), axis=0)
        nearer = top > best[0]
        return (jnp.where(nearer, top, best[0]), jnp.where(nearer, index, best[1])), None

    none = jnp.full_like(rows[:, 0], -jnp.inf)
    firsts = plan.columns * jnp.arange(tiles, dtype=jnp.int32)
    best = none, jnp.zeros_like(none, jnp.int32)
    return lax.scan(visit, best, (centroids, half, firsts), unroll=tiles == 1)[0][1]


def to_fixed(
    plan: Plan, rows: Float[Array, "b d"], exponent: Int32[Array, " d"]
) -> Int32[Array, "b limbs*d"]:
    """The rows in fixed point, their limbs side by side; the last limb is signed.

    2**exponent is above all values of a column.
    """
    integers = jnp.round(jnp.ldexp(rows, plan.precision - exponent)).astype(jnp.int32)
    limbs = [integers >> (i * plan.bits) for i in range(plan.limbs)]
    return jnp.concatenate([x & (2**plan.bits - 1) for x in limbs[:-1]] + limbs[-1:], axis=1)


def from_fixed(
    plan: Plan, sums: Int32[Array, "k limbs*d"], exponent: Int32[Array, " d"]
) -> Float[Array, "k d"]:
    """Sums of `to_fixed` rows, as float32."""
    limbs = jnp.split(sums.astype(jnp.float32), plan.limbs, axis=1)
    total = sum(limb * 2.0 ** (i * plan.bits) for i, limb in enumerate(limbs))
    return jnp.ldexp(total, exponent - plan.precision)


def split_empty(
    centroids: Float[Array, "k d"], counts: Float[Array, " k"], key: Array
) -> Float[Array, "k d"]:
    """`centroids`, in which each centroid without members is replaced by half of another cluster.

    The donor is sampled in proportion to its number of members less one (faiss, Clustering.cpp).
    """
    alternate = jnp.where(jnp.arange(centroids.shape[1]) % 2, -_SPLIT, _SPLIT)

    def split(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        centroids, counts, step = state
        empty = jnp.argmin(counts)  # the first centroid without members
        cumulative = jnp.cumsum(jnp.maximum(counts - 1, 0))
        u = jax.random.uniform(jax.random.fold_in(key, step)) * cumulative[-1]
        donor = jnp.searchsorted(cumulative, u, side="right")
        half = counts[donor] / 2
        centroids = centroids.at[empty].set(centroids[donor] * (1 + alternate))
        centroids = centroids.at[donor].multiply(1 - alternate)
        return centroids, counts.at[empty].set(half).at[donor].set(half), step + 1

    state = centroids, counts, jnp.int32(0)
    return lax.while_loop(lambda state: jnp.any(state[1] == 0), split, state)[0]
