"""Layers that towers compute in another way on TPUs.

A TPU's vector unit sums slowly. Its matrix unit sums fast, and in float32, if one factor is all
ones. The results agree with the usual layers up to rounding.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float

from clipx.types import Array

# Names for remat policies. STATISTICS: a norm's two numbers per token, which every policy saves.
# PRODUCTS: weight products with what is added to them, which a policy that saves products saves.
STATISTICS, PRODUCTS = "statistics", "products"


def _dot(a: Array, b: Array) -> Array:
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, preferred_element_type=jnp.float32, precision=precision)


def _column_sums(x: Float[Array, "r c"]) -> Float[Array, " c"]:
    return _dot(jnp.ones((8, x.shape[0]), x.dtype), x)[0]


def _row_means(x: Float[Array, "*r c"]) -> Float[Array, "*r 1"]:
    return _dot(x, jnp.ones((x.shape[-1], 8), x.dtype))[..., :1] / x.shape[-1]


@jax.custom_vjp
def add_bias(x: Float[Array, "r c"], bias: Float[Array, " c"]) -> Float[Array, "r c"]:
    """x + bias; the gradient of the bias is summed in float32."""
    return x + bias


def _add_bias_backward(_: None, dy: Array) -> tuple[Array, Array]:
    return dy, _column_sums(dy).astype(dy.dtype)


add_bias.defvjp(lambda x, bias: (x + bias, None), _add_bias_backward)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def layer_norm(
    x: Float[Array, "*r c"],
    scale: Float[Array, " c"],
    bias: Float[Array, " c"],
    epsilon: float,
    dtype: str,
) -> Float[Array, "*r c"]:
    """Layer normalisation in float32, cast to `dtype` at the end; the variance takes two passes.

    The statistics are residuals of the backward pass, under the name `STATISTICS`.
    """
    return _layer_norm_forward(x, scale, bias, epsilon, dtype)[0]


def _layer_norm_forward(
    x: Array, scale: Array, bias: Array, epsilon: float, dtype: str
) -> tuple[Array, tuple[Array, ...]]:
    mean = checkpoint_name(_row_means(x), STATISTICS)
    centred = x.astype(jnp.float32) - mean
    inverse_std = jax.lax.rsqrt(_row_means(jnp.square(centred)) + epsilon)
    inverse_std = checkpoint_name(inverse_std, STATISTICS)
    y = centred * (inverse_std * scale) + bias
    return y.astype(dtype), (x, scale, mean, inverse_std)


def _layer_norm_backward(
    epsilon: float, dtype: str, residuals: tuple[Array, ...], dy: Array
) -> tuple[Array, Array, Array]:
    x, scale, mean, inverse_std = residuals
    dy = dy.astype(jnp.float32)
    normed = (x.astype(jnp.float32) - mean) * inverse_std
    d_normed = dy * scale
    along = jnp.mean(d_normed * normed, axis=-1, keepdims=True)
    dx = inverse_std * (d_normed - jnp.mean(d_normed, axis=-1, keepdims=True) - normed * along)
    rows = tuple(range(x.ndim - 1))
    return dx.astype(x.dtype), jnp.sum(dy * normed, axis=rows), jnp.sum(dy, axis=rows)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)
