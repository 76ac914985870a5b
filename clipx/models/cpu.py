"""Layers written in the way that XLA compiles best for one CPU device.

They agree with the plain ones up to rounding. Elsewhere they are the plain ones.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Float

from clipx.types import Array, platform


def on_one_cpu() -> bool:
    """Whether the program that is being traced will run on one CPU device."""
    mesh = jax.sharding.get_abstract_mesh()
    return platform() == "cpu" and (mesh.empty or mesh.size == 1)


def _stored(x: Array) -> Array:
    """x, computed as an array of its own, since the compiler does not know the condition.

    `jax.lax.optimization_barrier` would say it better, but XLA drops barriers before it fuses.
    """
    first = x[(0,) * x.ndim]
    return lax.cond(first < first - 1, jnp.negative, lambda x: x, x)  # never


@jax.custom_vjp
def _hold(x: Array) -> Array:
    return _stored(x)


_hold.defvjp(lambda x: (_stored(x), None), lambda _, dx: (_stored(dx),))


def hold(x: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """x; on one CPU device, x and its gradient are computed once and stored.

    Without it XLA fuses the sums of a residual stream into everything that reads them, so that each
    block computes the gradients of all later ones again, several times: a third of the time of
    ViT-B/32. On several devices the condition would need communication.
    """
    fixed = isinstance(x.size, int) and x.size > 0  # exports to ONNX leave the batch open
    return _hold(x) if fixed and on_one_cpu() else x


@jax.custom_vjp
def _dot(x: Float[Array, "r k"], kernel: Float[Array, "k n"]) -> Float[Array, "r n"]:
    """x times kernel, with a gradient of the kernel that needs no transposition.

    JAX's own rule multiplies the gradient of the result with x and transposes the product, which
    XLA then reads with long strides, in the optimizer.
    """
    return jnp.dot(x, kernel)


def _kernel_gradient(x: Float[Array, "r k"], dy: Float[Array, "r n"]) -> Float[Array, "k n"]:
    """x' dy, without a transposition."""
    return lax.dot_general(x, dy, (((0,), (0,)), ((), ())))


def _dot_forward(x: Any, kernel: Any) -> tuple[Array, tuple[Array | None, Array | None]]:
    # a factor of a gradient that nobody asks for is not kept
    saved = x.value if kernel.perturbed else None, kernel.value if x.perturbed else None
    return jnp.dot(x.value, kernel.value), saved


def _dot_backward(
    saved: tuple[Array | None, Array | None], dy: Array
) -> tuple[Array | None, Array | None]:
    x, kernel = saved
    dx = None if kernel is None else lax.dot_general(dy, kernel, (((1,), (1,)), ((), ())))
    return dx, None if x is None else _kernel_gradient(x, dy)


_dot.defvjp(_dot_forward, _dot_backward, symbolic_zeros=True)


def product(x: Float[Array, "*b"], kernel: Float[Array, "*k"], inputs: int = 1) -> Array:
    """The tensor product of x and a layer's kernel over the last `inputs` axes of x."""
    if not on_one_cpu():
        return jnp.tensordot(x, kernel, inputs)
    size = math.prod(kernel.shape[:inputs])
    y = _dot(x.reshape(-1, size), kernel.reshape(size, -1))
    return y.reshape(*x.shape[: x.ndim - inputs], *kernel.shape[inputs:])


def dot_general(x: Array, kernel: Array, dimension_numbers: Any, *_: Any, **__: Any) -> Array:
    """`product`, as the argument `dot_general` of flax's dense layers."""
    (over, _), (batch, _) = dimension_numbers
    inputs = len(over)
    last = tuple(over) == tuple(range(x.ndim - inputs, x.ndim))
    assert last and not batch, dimension_numbers
    return product(x, kernel, inputs)


_CONVOLVE = functools.partial(lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC"))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _small_convolution(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "p q c k"],
    strides: tuple[int, int],
    padding: tuple[tuple[int, int], tuple[int, int]],
) -> Float[Array, "b i j k"]:
    """A convolution whose kernel's gradient is one product for each of its pixels.

    XLA's gradient is a convolution by a kernel as large as the picture, which takes up to five
    times as long (32 channels at 112 pixels).
    """
    return _CONVOLVE(x, kernel, strides, padding)


def _small_forward(x: Array, kernel: Array, *options: Any) -> tuple[Array, tuple[Array, Array]]:
    return _small_convolution(x, kernel, *options), (x, kernel)


def _small_backward(
    strides: tuple[int, int],
    padding: tuple[tuple[int, int], tuple[int, int]],
    saved: tuple[Array, Array],
    dy: Array,
) -> tuple[Array, Array]:
    x, kernel = saved
    (dx,) = jax.linear_transpose(lambda x: _CONVOLVE(x, kernel, strides, padding), x)(dy)
    x, (_, height, width, out) = jnp.pad(x, ((0, 0), *padding, (0, 0))), dy.shape
    dy = dy.reshape(-1, out)

    def pixel(i: int, j: int) -> Array:
        """The gradient of one pixel of the kernel [c, k]."""
        ends = i + strides[0] * (height - 1) + 1, j + strides[1] * (width - 1) + 1
        met = x[:, i : ends[0] : strides[0], j : ends[1] : strides[1]]
        return _kernel_gradient(met.reshape(len(dy), -1), dy)

    dkernel = jnp.stack([pixel(*place) for place in np.ndindex(kernel.shape[:2])])
    return dx, dkernel.reshape(kernel.shape)


_small_convolution.defvjp(_small_forward, _small_backward)


def convolution(x: Array, kernel: Array, strides: Any, padding: Any, **options: Any) -> Array:
    """The argument `conv_general_dilated` of flax's convolutions. On one CPU device one of single
    pixels is a product, as XLA's gradients of it are two to five times slower, and one of up to 3x3
    pixels has a gradient of its own."""
    size, ones = kernel.shape[:2], (1, 1)
    dilations = (options.get(name) or ones for name in ("lhs_dilation", "rhs_dilation"))
    plain = (
        options.get("feature_group_count", 1) == 1
        and all(tuple(dilation) == ones for dilation in dilations)
        and not isinstance(padding, str)
    )
    if not (plain and math.prod(size) <= 9 and on_one_cpu()):
        return lax.conv_general_dilated(x, kernel, strides, padding, **options)
    padding = tuple(map(tuple, padding))
    if size == ones:
        assert not any(map(any, padding)), padding
        return product(x[:, :: strides[0], :: strides[1]], kernel[0, 0])
    return _small_convolution(x, kernel, tuple(strides), padding)
