"""What all forms of a pairwise loss share: rows, products, and the mask of excluded pairs."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from clipx.types import Array, PyTree

NEVER = -1e30  # a masked logit: finite, so that no gradient is NaN


class Rows(NamedTuple):
    """Arrays with the row axis first. Gradients flow to `values`, never to `constants`."""

    values: PyTree
    constants: PyTree = ()


def group_size(a: Float[Array, "a d"], b: Float[Array, "b e"], groups: int) -> int | None:
    """The number of rows per group; None for one group.

    Raises `ValueError` if a and b differ in shape, or if `groups` does not divide the rows.
    """
    if a.shape != b.shape:
        raise ValueError(f"the two towers' rows differ in shape: {a.shape} and {b.shape}")
    if groups < 1 or a.shape[0] % groups:
        raise ValueError(f"{a.shape[0]} rows do not divide into groups={groups}")
    return a.shape[0] // groups if groups > 1 else None


def excluded_pairs(
    index: Int[Array, " c"],
    ids: Int[Array, " c"] | None,
    columns: Int[Array, " t"],
    column_ids: Int[Array, " t"] | None,
    size: int | None,
) -> Bool[Array, "c t"]:
    """Mask of the pairs that the loss leaves out: True for a pair that does not count.

    These are pairs of different rows with the same id, and pairs of rows from different groups of
    `size` rows; with `size=None` there is one group. `index` and `columns` are positions in the
    global batch.
    """
    out = jnp.zeros((index.shape[0], columns.shape[0]), bool)
    if column_ids is not None:
        assert ids is not None  # ids and column_ids are None together
        out |= (ids[:, None] == column_ids[None, :]) & (index[:, None] != columns[None, :])
    if size is not None:
        out |= (index // size)[:, None] != (columns // size)[None, :]
    return out


def wide(*arrays: Array) -> jnp.dtype:
    """float32, or float64 if an array is float64."""
    return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)


def narrow(x: Array) -> DTypeLike:
    """The dtype in which rows of x are multiplied: bfloat16 for bfloat16, else float32 at least.

    float16 rows are multiplied in float32, because a gradient may exceed the range of float16.
    """
    return jnp.bfloat16 if x.dtype == jnp.bfloat16 else wide(x)


def matches(a: Float[Array, "b d"], b: Float[Array, "b d"]) -> Float[Array, " b"]:
    """The product of each row of a with its match, the same row of b; float32 at least."""
    return jnp.sum(a.astype(wide(a)) * b.astype(wide(a)), axis=-1)


def product(a: Float[Array, "c d"], b: Float[Array, "t d"]) -> Float[Array, "c t"]:
    """a @ b.T, accumulated in float32 at least and never rounded below the inputs' own dtype."""
    if a.dtype == b.dtype == jnp.bfloat16:
        return narrow_product(a.astype(jnp.float32), b.astype(jnp.float32), jnp.bfloat16)
    highest = lax.Precision.HIGHEST
    return jnp.einsum("id,jd->ij", a, b, preferred_element_type=wide(a), precision=highest)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def narrow_product(
    a: Float[Array, "c d"], b: Float[Array, "t d"], dtype: DTypeLike
) -> Float[Array, "c t"]:
    """a @ b.T, multiplied in `dtype` in both passes. The rows are float32 at least and were cast
    from `dtype`.

    For bfloat16 the two passes take three bfloat16 products. Autodiff would take the two products
    of the backward pass in float32, and an accelerator needs six bfloat16 products for each.
    """
    return _einsum("id,jd->ij", a, b, dtype)


def _einsum(how: str, a: Array, b: Array, dtype: DTypeLike) -> Array:
    a, b, out = a.astype(dtype), b.astype(dtype), wide(a)
    highest = lax.Precision.HIGHEST
    return jnp.einsum(how, a, b, preferred_element_type=out, precision=highest)


def _narrow_backward(
    dtype: DTypeLike, rows: tuple[Array, Array], slopes: Array
) -> tuple[Array, Array]:
    a, b = rows
    return _einsum("ij,jd->id", slopes, b, dtype), _einsum("ij,id->jd", slopes, a, dtype)


narrow_product.defvjp(
    lambda a, b, dtype: (_einsum("id,jd->ij", a, b, dtype), (a, b)), _narrow_backward
)
