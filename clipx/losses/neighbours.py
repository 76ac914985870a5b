"""Nearest neighbours in a queue of the rows of earlier batches (DeCLIP)."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Int

from clipx.losses.pairwise import product, wide
from clipx.losses.tiles import Axes, first_row, spread, tiles
from clipx.types import Array, PyTree, batch_axes


def nearest(
    query: Float[Array, "b d"], bank: Float[Array, "*g k d"], *, chunk: int | None = None
) -> Float[Array, "b d"]:
    """For each row of `query`, the row of `bank` with the largest cosine, as it is stored.

    Of several equal cosines the first wins. No gradient flows. The bank is replicated. It is
    searched in tiles of `chunk` rows of `query`; None picks the number. A bank [g k d] is g banks,
    one for each group of b/g consecutive rows, as on g devices that exchange nothing.

    Raises `ValueError` if the number of banks does not divide the rows. Source: DeCLIP (arXiv
    2110.05208), section 3.2.
    """
    groups = bank.shape[0] if bank.ndim == 3 else 1
    if query.shape[0] % groups:
        raise ValueError(f"{query.shape[0]} rows do not divide into {groups} banks")
    size = query.shape[0] // groups

    def search(axes: Axes, query: Array, bank: Array) -> Array:
        norm = jnp.sqrt(jnp.sum(jnp.square(bank.astype(wide(bank))), axis=-1))
        inverse_norm = 1 / jnp.maximum(norm, 1e-12)

        def tile(carry: tuple, query: Array, valid: Array) -> tuple[tuple, Array]:
            return carry, jnp.argmax(product(query, bank) * inverse_norm, axis=1)

        return bank[tiles(tile, (), query, chunk, bank.shape[0], axes)[1]]

    def local(axes: Axes, rows: PyTree, scalars: tuple) -> Array:
        (query,), (bank,) = rows, scalars
        if bank.ndim == 2:
            return search(axes, query, bank)
        block = math.gcd(query.shape[0], size)  # rows of one device and of one group
        blocks = query.reshape(-1, block, query.shape[1])
        first = first_row(axes, query.shape[0]) + block * jnp.arange(blocks.shape[0])
        neighbours = lax.map(lambda x: search(axes, x[0], bank[x[1]]), (blocks, first // size))
        return neighbours.reshape(query.shape[0], -1)

    return spread(local, (lax.stop_gradient(query),), (lax.stop_gradient(bank),))


def enqueue(
    queue: Float[Array, "*g k d"], pointer: Int[Array, ""], rows: Float[Array, "b d"]
) -> tuple[Float[Array, "*g k d"], Int[Array, ""]]:
    """(the queue with `rows` written from `pointer` on, the next pointer).

    Writing does not wrap round, as in DeCLIP's memory bank (memory_bank.py): rows beyond the end of
    the queue are dropped, and the pointer returns to 0 once it reaches the end. Call `nearest`
    before `enqueue`, or the rows of a batch find themselves. A queue [g k d] is g queues, one for
    each group of b/g consecutive rows. No gradient flows.

    Raises `ValueError` if the number of queues does not divide the rows.
    """
    rows = lax.stop_gradient(rows).astype(queue.dtype)
    if batch_axes():  # the queue is replicated
        rows = lax.with_sharding_constraint(rows, P())
    groups = queue.shape[0] if queue.ndim == 3 else 1
    if rows.shape[0] % groups:
        raise ValueError(f"{rows.shape[0]} rows do not divide into {groups} queues")
    rows = rows.reshape(*queue.shape[:-2], -1, rows.shape[-1])
    end = pointer + rows.shape[-2]
    places = pointer + jnp.arange(rows.shape[-2])
    queue = jnp.asarray(queue).at[..., places, :].set(rows, mode="drop", unique_indices=True)
    return queue, jnp.where(end >= queue.shape[-2], 0, end).astype(pointer.dtype)
