"""Attention by the fastest kernel of the device: cuDNN's on GPUs, a Pallas kernel on TPUs.

Sequences in image-text models are short: all patches of an image, or all tokens of a caption, fit a
TPU's vector memory with all heads. So the TPU kernel neither tiles the sequence nor keeps a running
maximum, and scores and weights never reach the chip's main memory. The backward pass recomputes
them; its only residuals are the inputs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from clipx.models import cpu
from clipx.types import Array, batch_axes

_MANY = 32  # keys from which `_heads_first` is faster: not among 24 tokens, but among 50
_NEVER = -1e30  # a masked score: finite, so that no difference is NaN
_ROOM = 12 * 2**20  # bytes of vector memory for blocks and scores; the default limit is 16 MiB
_MOST = 28 * 2**20  # the same if a single row needs more; every TPU from v4 on has 32 MiB

# Pallas hands mutable references to a kernel; they have no public type.
Ref = Any
Static = tuple[int, bool, bool]  # heads, causal, interpret


@functools.cache
def _has_cudnn_attention() -> bool:
    device = jax.devices()[0]
    return "cuda" in device.client.platform_version and float(device.compute_capability) >= 8.0


def attention(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b s h d"],
    v: Float[Array, "b s h d"],
    *,
    causal: bool = False,
    lengths: Int[Array, " b"] | None = None,
    seen: Bool[Array, "b s"] | None = None,
) -> Float[Array, "b t h d"]:
    """Scaled dot-product attention of t queries over s keys; scores are scaled by d**-0.5.

    With `lengths`, row i attends to its first `lengths[i]` keys only, with `seen` to those keys
    only. With `causal`, a query attends to no later key. Softmax runs in float32, or in float64 for
    float64 inputs. Uses cuDNN's fused kernel if it supports the device, the dtype and the shapes.
    """
    fused = (
        q.dtype == jnp.bfloat16
        and seen is None
        and q.shape == k.shape
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= 128
        and _has_cudnn_attention()
    )
    if lengths is not None and not fused:  # the same mask, and all that an ONNX converter knows
        text = jnp.arange(k.shape[1]) < lengths[:, None]
        seen, lengths = text if seen is None else seen & text, None
    if q.dtype == jnp.float64:  # jax.nn.dot_product_attention takes every softmax in float32
        logits = jnp.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
        pairs = _pairs(logits, causal, seen)
        return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(logits, where=pairs), v)
    many = isinstance(q.size, int) and k.shape[1] >= _MANY  # exports leave the batch open
    if many and q.dtype == jnp.float32 and cpu.on_one_cpu():
        return _heads_first(q, k, v, causal, seen)
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=None if seen is None else seen[:, None, None],
        is_causal=causal,
        key_value_seq_lengths=lengths,
        implementation="cudnn" if fused else None,
    )


def _pairs(logits: Array, causal: bool, seen: Array | None) -> Array:
    """Which queries attend to which keys, in a shape that broadcasts to `logits` [b, h, t, s]."""
    pairs = jnp.ones(logits.shape[-2:], bool)
    pairs = jnp.tril(pairs) if causal else pairs
    return pairs if seen is None else pairs & seen[:, None, None]


def _heads_first(q: Array, k: Array, v: Array, causal: bool, seen: Array | None) -> Array:
    """`attention`, with each head of each row as a row of its own. On a CPU XLA multiplies these
    faster than arrays whose heads lie between, if there are many tokens."""
    b, t, h, d = q.shape
    q, k, v = (x.swapaxes(1, 2).reshape(b * h, -1, d) for x in (q, k, v))
    logits = jnp.einsum("rtd,rsd->rts", q, k).reshape(b, h, t, -1) * d**-0.5
    if causal or seen is not None:
        logits = jnp.where(_pairs(logits, causal, seen), logits, _NEVER)
    weights = jax.nn.softmax(logits).reshape(b * h, t, -1)
    return jnp.einsum("rts,rsd->rtd", weights, v).reshape(b, h, t, d).swapaxes(1, 2)


def has_kernel(rows: int, tokens: int, heads: int, head_width: int, dtype: DTypeLike) -> bool:
    """Whether `packed_attention` supports these sizes on the current mesh."""
    split, devices = _tensor(heads), math.prod(_mesh_sizes(batch_axes()))
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32) or rows % devices:
        return False
    row, scores = _vector_memory(tokens, heads // split, head_width, dtype)
    return row + scores <= _MOST


def packed_attention(
    qkv: Float[Array, "b n w"],
    lengths: Int[Array, " b"] | None = None,
    *,
    heads: int,
    causal: bool = False,
    interpret: bool = False,
) -> Float[Array, "b n c"]:
    """Scaled dot-product self-attention by the TPU kernel; w = 3c.

    The last axis of `qkv` is [heads, 3, c / heads] flattened: each head has its queries, keys and
    values side by side. With `lengths`, row i attends to its first `lengths[i]` keys only.

    Products are taken in the dtype of `qkv` and summed in float32; softmax runs in float32. Rows
    stay on their devices, and heads on the devices of the mesh's `tensor` axis. `interpret` runs
    the kernel on any backend, slowly.
    """
    b, n, _ = qkv.shape
    lengths = jnp.full(b, n, jnp.int32) if lengths is None else lengths.astype(jnp.int32)
    return _attend((heads, causal, interpret), qkv, lengths)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static: Static, qkv: Array, lengths: Array) -> Array:
    return _attend_forward(static, qkv, lengths)[0]


def _attend_forward(
    static: Static, qkv: Array, lengths: Array
) -> tuple[Array, tuple[Array, Array]]:
    return _spread(_forward_kernel, static, 1 / 3, lengths, qkv), (qkv, lengths)


def _attend_backward(
    static: Static, residuals: tuple[Array, Array], dy: Array
) -> tuple[Array, None]:
    qkv, lengths = residuals
    return _spread(_backward_kernel, static, 1.0, lengths, qkv, dy), None


_attend.defvjp(_attend_forward, _attend_backward)


def _mesh_sizes(axes: tuple[str, ...]) -> list[int]:
    mesh = jax.sharding.get_abstract_mesh()
    return [mesh.shape[a] for a in axes]


def _tensor(heads: int) -> int:
    """The number of devices over which the heads are split."""
    mesh = jax.sharding.get_abstract_mesh()
    size = mesh.shape.get("tensor", 1)
    return size if heads % size == 0 else 1


def _spread(
    kernel: Callable, static: Static, share: float, lengths: Array, *inputs: Array
) -> Array:
    """The output of the kernel, which runs on each device's rows and heads.

    The output is `share` times as wide as the first input.
    """
    heads, causal, interpret = static
    split = _tensor(heads)
    run = functools.partial(_call, kernel, heads // split, causal, interpret, share)
    axes = batch_axes()
    if split == 1 and not axes:
        return run(lengths, *inputs)
    spec = P(axes or None, None, "tensor" if split > 1 else None)
    # The kernel needs nothing from other devices. It is in a shard_map because the partitioner
    # cannot split a kernel by itself.
    spread = jax.shard_map(
        run,
        in_specs=(P(axes or None), *[spec] * len(inputs)),
        out_specs=spec,
        check_vma=False,
    )
    return spread(lengths, *inputs)


def _vector_memory(tokens: int, heads: int, head_width: int, dtype: DTypeLike) -> tuple[int, int]:
    """Bytes that the backward kernel needs: (for one row's blocks, double-buffered; for scores)."""
    item = jnp.dtype(dtype).itemsize
    padded, width = -(-tokens // 16) * 16, -(-3 * heads * head_width // 128) * 128
    return 2 * padded * width * item * 7 // 3, 6 * padded * (-(-tokens // 128) * 128) * 4


def _call(
    kernel: Callable,
    heads: int,
    causal: bool,
    interpret: bool,
    share: float,
    lengths: Array,
    *inputs: Array,
) -> Array:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    b, n, width = inputs[0].shape
    dtype, d = inputs[0].dtype, width // heads // 3
    row, scores = _vector_memory(n, heads, d, dtype)
    rows = max(r for r in range(1, b + 1) if b % r == 0 and (r == 1 or r * row + scores <= _ROOM))
    out = jax.ShapeDtypeStruct((b, n, round(width * share)), dtype)
    products = 2 if kernel is _forward_kernel else 5
    weights = b * heads * n * n
    cost = pl.CostEstimate(  # masked scores count too: the kernel computes them
        flops=weights * (2 * products * d + 3 * products),
        transcendentals=weights,
        bytes_accessed=sum(x.size * dtype.itemsize for x in (*inputs, out)),
    )

    def spec(x: Array | jax.ShapeDtypeStruct) -> pl.BlockSpec:
        return pl.BlockSpec((rows, *x.shape[1:]), lambda i, *_: (i, 0, 0))

    return pl.pallas_call(
        functools.partial(kernel, heads=heads, causal=causal),
        out_shape=out,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(b // rows,),
            in_specs=[spec(x) for x in inputs],
            out_specs=spec(out),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",),
            vmem_limit_bytes=2**25 if rows * row + scores > _ROOM else None,
        ),
        cost_estimate=cost,
        interpret=interpret,
    )(lengths, *inputs)


def _dot(a: Array, b: Array, contract: tuple[tuple[int, ...], tuple[int, ...]]) -> Array:
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def _seen(n: int, length: Array, causal: bool) -> Array:
    """Mask [n, n]: the keys that each query attends to."""
    key = jax.lax.broadcasted_iota(jnp.int32, (n, n), 1)
    seen = key < length
    return seen & (key <= jax.lax.broadcasted_iota(jnp.int32, (n, n), 0)) if causal else seen


def _parts(qkv: Ref, row: Array | int, head: int, d: int) -> Iterator[Array]:
    """The queries, keys and values [n, d] of a head."""
    first = 3 * d * head
    return (qkv[row, :, first + i * d : first + (i + 1) * d] for i in range(3))


def _weights(q: Array, k: Array, seen: Array) -> tuple[Array, Array]:
    """(exp(scores - maximum), 1 / its sum over keys)."""
    scores = jnp.where(seen, _dot(q, k, ((1,), (1,))) * q.shape[-1] ** -0.5, _NEVER)
    e = jnp.exp(scores - jnp.max(scores, axis=1, keepdims=True))
    return e, 1 / jnp.sum(e, axis=1, keepdims=True)


def _forward_kernel(lengths: Ref, qkv: Ref, out: Ref, *, heads: int, causal: bool) -> None:
    from jax.experimental import pallas as pl

    rows, n, c = out.shape
    d = c // heads
    first = pl.program_id(0) * rows

    def attend(row: Array | int, _: None) -> None:
        seen = _seen(n, lengths[first + row], causal)
        for head in range(heads):
            q, k, v = _parts(qkv, row, head, d)
            e, inverse_sum = _weights(q, k, seen)
            y = _dot(e.astype(v.dtype), v, ((1,), (0,))) * inverse_sum
            out[row, :, d * head : d * (head + 1)] = y.astype(out.dtype)

    jax.lax.fori_loop(0, rows, attend, None)


def _backward_kernel(
    lengths: Ref, qkv: Ref, dy: Ref, out: Ref, *, heads: int, causal: bool
) -> None:
    from jax.experimental import pallas as pl

    rows, n, c = dy.shape
    d = c // heads
    first = pl.program_id(0) * rows

    def attend(row: Array | int, _: None) -> None:
        seen = _seen(n, lengths[first + row], causal)
        for head in range(heads):
            q, k, v = _parts(qkv, row, head, d)
            g = dy[row, :, d * head : d * (head + 1)]
            e, inverse_sum = _weights(q, k, seen)
            p = e * inverse_sum
            dp = _dot(g, v, ((1,), (1,)))
            ds = p * (dp - jnp.sum(p * dp, axis=1, keepdims=True)) * d**-0.5
            p, ds = p.astype(q.dtype), ds.astype(q.dtype)
            grads = _dot(ds, k, ((1,), (0,))), _dot(ds, q, ((0,), (0,))), _dot(p, g, ((0,), (0,)))
            for i, grad in enumerate(grads):
                place = (3 * head + i) * d
                out[row, :, place : place + d] = grad.astype(out.dtype)

    jax.lax.fori_loop(0, rows, attend, None)
