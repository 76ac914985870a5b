"""The parts of Lloyd's algorithm that run on one device: tiles, fixed point, empty clusters.

`clipx.ops.kmeans` calls them, and does all that happens across devices.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

_SPLIT = 1 / 1024  # how far the halves of a split cluster are put apart
# (Elements of a tile of rows x centroids, centroids of a tile) at most, by backend. A CPU's tile
# fits a core's cache; an accelerator's is large enough to keep it busy.
TILES = {"cpu": (2**18, 2**10)}
_LARGE_TILE = (2**25, 2**13)


class Plan(NamedTuple):
    """All that is static in a clustering of n rows by k centroids."""

    n: int
    k: int
    rows: int  # rows of a tile
    columns: int  # centroids of a tile
    bits: int  # bits of one limb of a fixed-point sum
    spherical: bool

    @property
    def limbs(self) -> int:
        return -(-24 // self.bits)

    @property
    def precision(self) -> int:
        """Bits kept of a column's largest value: no fewer than a float32 has."""
        return min(30, self.bits * self.limbs)


def make_plan(
    n: int, d: int, k: int, *, devices: int = 1, spherical: bool = False, chunk: int | None = None
) -> Plan:
    """The plan for rows [n d] spread over `devices`; `chunk` is the rows of a tile, None picks it.

    Tiles of rows have one size, chosen so that little padding is needed.
    """
    bits = min(15, 31 - n.bit_length())  # the sum of n limbs stays below 2**31
    tile, columns = TILES.get(jax.default_backend(), _LARGE_TILE)
    columns = -(-k // -(-k // columns))
    plan = Plan(n, k, 1, columns, bits, spherical)
    rows = chunk or max(1, tile // max(columns, plan.limbs * d))
    own = -(-n // devices)
    return plan._replace(rows=-(-own // -(-own // rows)))


def unit(x: Float[Array, "n d"]) -> Float[Array, "n d"]:
    """Rows scaled to length 1; zeros stay zeros."""
    return x / jnp.maximum(jnp.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def nearest_centroid(
    plan: Plan, rows: Float[Array, "b d"], centroids: Float[Array, "k d"]
) -> Int32[Array, " b"]:
    """The nearest centroid of each row of a tile; of equally near ones the first.

    It has the largest x·c - |c|²/2. A CPU vectorises two passes, for the largest value and then
    for its place; it does not vectorise an argmax.
    """
    tiles = -(-plan.k // plan.columns)
    pad = tiles * plan.columns - plan.k
    half = 0.5 * jnp.sum(jnp.square(centroids), axis=1)
    half = jnp.pad(half, (0, pad), constant_values=jnp.inf).reshape(tiles, plan.columns)
    centroids = jnp.pad(centroids, ((0, pad), (0, 0))).reshape(tiles, plan.columns, -1)

    def look(best, tile):
        centroids, half, first = tile
        score = jnp.matmul(centroids, rows.T, precision=lax.Precision.HIGHEST) - half[:, None]
        top = jnp.max(score, axis=0)
        place = first + jnp.arange(plan.columns, dtype=jnp.int32)[:, None]
        place = jnp.min(jnp.where(score == top, place, plan.k - 1), axis=0)
        nearer = top > best[0]
        return (jnp.where(nearer, top, best[0]), jnp.where(nearer, place, best[1])), None

    none = jnp.full_like(rows[:, 0], -jnp.inf)
    firsts = plan.columns * jnp.arange(tiles, dtype=jnp.int32)
    best = none, jnp.zeros_like(none, jnp.int32)
    return lax.scan(look, best, (centroids, half, firsts), unroll=tiles == 1)[0][1]


def to_fixed(
    plan: Plan, rows: Float[Array, "b d"], exponent: Int32[Array, " d"]
) -> Int32[Array, "b limbs*d"]:
    """The rows in fixed point, their limbs side by side; the last limb is signed.

    `exponent` [d] is that of a power of two above each column's values.
    """
    whole = jnp.round(jnp.ldexp(rows, plan.precision - exponent)).astype(jnp.int32)
    limbs = [whole >> (i * plan.bits) for i in range(plan.limbs)]
    return jnp.concatenate([x & (2**plan.bits - 1) for x in limbs[:-1]] + limbs[-1:], axis=1)


def from_fixed(
    plan: Plan, sums: Int32[Array, "k limbs*d"], exponent: Int32[Array, " d"]
) -> Float[Array, "k d"]:
    """Sums of `to_fixed` as float32."""
    parts = jnp.split(sums.astype(jnp.float32), plan.limbs, axis=1)
    total = sum(part * 2.0 ** (i * plan.bits) for i, part in enumerate(parts))
    return jnp.ldexp(total, exponent - plan.precision)


def split_empty(
    centroids: Float[Array, "k d"], counts: Float[Array, " k"], key: Array
) -> Float[Array, "k d"]:
    """The centroids, those without members replaced by half of another cluster each.

    The donor is drawn in proportion to its members less one (faiss, Clustering.cpp).
    """
    alternate = jnp.where(jnp.arange(centroids.shape[1]) % 2, -_SPLIT, _SPLIT)

    def split(state):
        centroids, counts, draw = state
        empty = jnp.argmin(counts)  # the first of those without members
        chance = jnp.cumsum(jnp.maximum(counts - 1, 0))
        u = jax.random.uniform(jax.random.fold_in(key, draw)) * chance[-1]
        donor = jnp.searchsorted(chance, u, side="right")
        half = counts[donor] / 2
        centroids = centroids.at[empty].set(centroids[donor] * (1 + alternate))
        centroids = centroids.at[donor].multiply(1 - alternate)
        return centroids, counts.at[empty].set(half).at[donor].set(half), draw + 1

    state = centroids, counts, jnp.int32(0)
    return lax.while_loop(lambda state: jnp.any(state[1] == 0), split, state)[0]
