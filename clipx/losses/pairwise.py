"""What all forms of a pairwise loss share: rows, products, and the pairs that are left out."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from clipx.types import PyTree

NEVER = -1e30  # a masked logit: finite, so that no gradient is NaN


class Rows(NamedTuple):
    """Arrays with the row axis first. Gradients reach `values`, never `constants`."""

    values: PyTree
    constants: PyTree = ()


def group_size(a: Float[Array, "b d"], b: Float[Array, "b d"], groups: int) -> int | None:
    """The number of rows of each group; None for one group.

    Raises `ValueError` for towers whose rows differ in shape, and for rows that do not divide into
    the groups.
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
    """Mask of the pairs that the loss leaves out.

    Left out are pairs of different rows with the same id, and pairs of rows from different groups
    of `size` rows; None stands for one group. `index` and `columns` are the rows' places in the
    whole batch.
    """
    out = jnp.zeros((index.shape[0], columns.shape[0]), bool)
    if column_ids is not None:
        out |= (ids[:, None] == column_ids[None, :]) & (index[:, None] != columns[None, :])
    if size is not None:
        out |= (index // size)[:, None] != (columns // size)[None, :]
    return out


def wide(*arrays: Array) -> jnp.dtype:
    """Float32, or float64 if an array is float64."""
    return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)


def narrow(x: Array) -> jnp.dtype:
    """The dtype in which rows of x are multiplied: bfloat16, or float32 at least.

    Float16 is not: a gradient may not fit its range.
    """
    return jnp.bfloat16 if x.dtype == jnp.bfloat16 else wide(x)


def matches(a: Float[Array, "b d"], b: Float[Array, "b d"]) -> Float[Array, " b"]:
    """The product of each row with its own match, float32 at least."""
    return jnp.sum(a.astype(wide(a)) * b.astype(wide(a)), axis=-1)


def product(a: Float[Array, "c d"], b: Float[Array, "t d"]) -> Float[Array, "c t"]:
    """a @ b.T, accumulated in float32 at least and never rounded below the inputs' own dtype."""
    if a.dtype == b.dtype == jnp.bfloat16:
        return narrow_product(a.astype(jnp.float32), b.astype(jnp.float32), jnp.bfloat16)
    highest = lax.Precision.HIGHEST
    return jnp.einsum("id,jd->ij", a, b, preferred_element_type=wide(a), precision=highest)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def narrow_product(
    a: Float[Array, "c d"], b: Float[Array, "t d"], dtype: jnp.dtype
) -> Float[Array, "c t"]:
    """a @ b.T of wide rows that were made from `dtype`, multiplied in `dtype` in both passes.

    For bfloat16 that is three products of bfloat16. Autodiff would take two of them in float32,
    where an accelerator needs six of bfloat16 for each.
    """
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
