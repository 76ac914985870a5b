"""A TPU kernel for late interaction: sums of each token's best product, without the products.

The products of all tokens of two rows outnumber the rows' own numbers many times, and in plain
array code each pass over them takes longer than the matrix unit took to make them. The kernel
compares products while they are in vector memory, and its backward pass computes them again.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from clipx.losses.tiles import size
from clipx.types import Array, batch_axes, on_tpu

ROWS = 256  # of either side per call
_BLOCK = 128  # rows of a in one step of the grid, at most
_TILE = 16  # bfloat16 rows of a tile of vector memory
_TOKENS = 16  # tokens of a in one step of the grid, at most
_MEMORY = 28 * 2**20  # bytes of vector memory; every TPU from v4 on has 32 MiB

# Pallas hands mutable references to a kernel; they have no public type.
Ref = Any


def has_kernel(a: Array, b: Array) -> bool:
    """Whether `sum_of_best` takes tiles of a's and b's rows on the current mesh's devices."""
    (n, d), (m, _) = a.shape[1:], b.shape[1:]
    # of each block two bfloat16 copies, and two of its float32 gradient
    held = 12 * (m * ROWS + _divisor(n, _TOKENS) * _BLOCK) * d
    even = d % 128 == 0 and a.shape[0] // size(batch_axes()) % _TILE == 0
    return on_tpu() and a.dtype == b.dtype == jnp.bfloat16 and even and held <= _MEMORY


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def sum_of_best(
    a: Float[Array, "i n d"], b: Float[Array, "t m d"], interpret: bool = False
) -> Float[Array, "i t"]:
    """For each row of a and each row of b: the sum, over a's tokens, of the largest product with a
    token of b. i and t are at most `ROWS`, and on TPUs multiples of 16.

    Tokens are float32 and were cast from bfloat16, in which they are multiplied in both passes.
    Among equal largest products the first gets the gradient. `interpret` runs the kernel on any
    backend, slowly.
    """
    return _forward(a, b, interpret)[0]


def _forward(a: Array, b: Array, interpret: bool) -> tuple[Array, tuple[Array, Array]]:
    from jax.experimental import pallas as pl

    x, y = _tokens_first(a), _tokens_first(b)
    (n, i, d), (m, t, _) = x.shape, y.shape
    rows, tokens = _divisor(i, _BLOCK, _TILE), _divisor(n, _TOKENS)
    scores = _call(
        _forward_kernel,
        (i // rows, n // tokens),
        (x, y),
        [
            pl.BlockSpec((tokens, rows, d), lambda r, k: (k, r, 0)),
            pl.BlockSpec((m, t, d), lambda r, k: (0, 0, 0)),
        ],
        [((i, t), pl.BlockSpec((rows, t), lambda r, k: (r, 0)))],
        products=1,
        interpret=interpret,
    )[0]
    return scores, (a, b)


def _backward(interpret: bool, residuals: tuple[Array, Array], slopes: Array) -> Any:
    from jax.experimental import pallas as pl

    x, y = map(_tokens_first, residuals)
    (n, i, d), (m, t, _) = x.shape, y.shape
    rows, tokens = _divisor(i, _BLOCK, _TILE), _divisor(n, _TOKENS)
    x_spec = pl.BlockSpec((tokens, rows, d), lambda r, k: (k, r, 0))
    y_spec = pl.BlockSpec((m, t, d), lambda r, k: (0, 0, 0))
    dx, dy = _call(
        _backward_kernel,
        (i // rows, n // tokens),
        (x, y, slopes),
        [x_spec, y_spec, pl.BlockSpec((rows, t), lambda r, k: (r, 0))],
        [(x.shape, x_spec), (y.shape, y_spec)],
        products=3,
        interpret=interpret,
    )
    return dx.swapaxes(0, 1), dy.swapaxes(0, 1)


sum_of_best.defvjp(_forward, _backward)


def _tokens_first(x: Array) -> Array:
    return x.astype(jnp.bfloat16).swapaxes(0, 1)


def _divisor(number: int, most: int, factor: int = 1) -> int:
    """The largest divisor of `number` that is a multiple of `factor` and at most `most`."""
    return max(k for k in range(factor, min(number, most) + 1, factor) if number % k == 0)


def _call(
    kernel: Any,
    grid: tuple[int, ...],
    inputs: tuple[Array, ...],
    in_specs: list[Any],
    outputs: list[tuple[tuple[int, ...], Any]],
    *,
    products: int,
    interpret: bool,
) -> list[Array]:
    """The kernel's float32 outputs. products: matrix products per pair of tokens."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    x, y = inputs[:2]
    varying = jax.typeof(x).manual_axis_type  # of the shard_map around it
    shapes = [
        jax.ShapeDtypeStruct(shape, jnp.float32, manual_axis_type=varying) for shape, _ in outputs
    ]
    pairs = math.prod(x.shape[:2]) * math.prod(y.shape[:2])
    moved = sum(v.size * v.dtype.itemsize for v in (*inputs, *shapes))
    return pl.pallas_call(
        kernel,
        out_shape=shapes,
        grid=grid,
        in_specs=in_specs,
        out_specs=[spec for _, spec in outputs],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",) * len(grid), vmem_limit_bytes=2**25
        ),
        cost_estimate=pl.CostEstimate(
            flops=pairs * products * (2 * x.shape[-1] + 2), transcendentals=0, bytes_accessed=moved
        ),
        interpret=interpret,
    )(*inputs)


def _dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _forward_kernel(x: Ref, y: Ref, out: Ref) -> None:
    from jax.experimental import pallas as pl

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        out[...] = jnp.zeros(out.shape, out.dtype)

    def token(k: Array | int, _: None) -> None:
        best = _dot(x[k], y[0], (1, 1))
        for j in range(1, y.shape[0]):
            best = jnp.maximum(best, _dot(x[k], y[j], (1, 1)))
        out[...] += best

    jax.lax.fori_loop(0, x.shape[0], token, None)


def _backward_kernel(x: Ref, y: Ref, slopes: Ref, dx: Ref, dy: Ref) -> None:
    from jax.experimental import pallas as pl

    @pl.when((pl.program_id(0) == 0) & (pl.program_id(1) == 0))
    def _() -> None:
        dy[...] = jnp.zeros(dy.shape, dy.dtype)

    def token(k: Array | int, _: None) -> None:
        best = _dot(x[k], y[0], (1, 1))
        chosen = jnp.zeros(best.shape, jnp.int32)
        for j in range(1, y.shape[0]):
            product = _dot(x[k], y[j], (1, 1))
            chosen = jnp.where(product > best, j, chosen)
            best = jnp.maximum(best, product)
        total = jnp.zeros(dx.shape[1:], jnp.float32)
        for j in range(y.shape[0]):
            share = jnp.where(chosen == j, slopes[...], 0).astype(x.dtype)
            total += _dot(share, y[j], (1, 0))
            dy[j] += _dot(share, x[k], (0, 0))
        dx[k] = total

    jax.lax.fori_loop(0, x.shape[0], token, None)
