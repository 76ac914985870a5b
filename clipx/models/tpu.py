"""What towers compute in another way on TPUs, whose vector unit sums slowly and whose matrix unit,
given ones to multiply with, sums fast and in float32. The numbers are the same up to rounding.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

# Names that remat policies know: a norm's two numbers per token, which no policy makes again, and
# what a kernel of attention makes, which is to them as a product of weights is.
STATISTICS, ATTENDED = "statistics", "attended"


def on_tpu() -> bool:
    """Whether what is traced now will run on TPUs: on those of the mesh that is set, which need not
    be here, or else on the default ones."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return (device.platform if device is not None else jax.default_backend()) == "tpu"


def _dot(a, b):
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, preferred_element_type=jnp.float32, precision=precision)


def _column_sums(x: Float[Array, "r c"]) -> Float[Array, " c"]:
    return _dot(jnp.ones((8, x.shape[0]), x.dtype), x)[0]


def _row_means(x: Float[Array, "*r c"]) -> Float[Array, "*r 1"]:
    return _dot(x, jnp.ones((x.shape[-1], 8), x.dtype))[..., :1] / x.shape[-1]


@jax.custom_vjp
def add_bias(x: Float[Array, "r c"], bias: Float[Array, " c"]) -> Float[Array, "r c"]:
    """x + bias, the gradient of the bias summed in float32."""
    return x + bias


def _add_bias_backward(_, dy):
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
    """Layer normalisation, its variance in two passes, all in float32 until the result's `dtype`.
    The gradient keeps the statistics under the name `STATISTICS`."""
    return _layer_norm_forward(x, scale, bias, epsilon, dtype)[0]


def _layer_norm_forward(x, scale, bias, epsilon, dtype):
    mean = checkpoint_name(_row_means(x), STATISTICS)
    apart = x.astype(jnp.float32) - mean
    inverse = jax.lax.rsqrt(_row_means(jnp.square(apart)) + epsilon)
    inverse = checkpoint_name(inverse, STATISTICS)
    y = apart * (inverse * scale) + bias
    return y.astype(dtype), (x, scale, mean, inverse)


def _layer_norm_backward(epsilon, dtype, residuals, dy):
    x, scale, mean, inverse = residuals
    dy = dy.astype(jnp.float32)
    unit = (x.astype(jnp.float32) - mean) * inverse
    part = dy * scale
    along = jnp.mean(part * unit, axis=-1, keepdims=True)
    dx = inverse * (part - jnp.mean(part, axis=-1, keepdims=True) - unit * along)
    rows = tuple(range(x.ndim - 1))
    return dx.astype(x.dtype), jnp.sum(dy * unit, axis=rows), jnp.sum(dy, axis=rows)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)
