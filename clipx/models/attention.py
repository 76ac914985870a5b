"""Attention, by the kernel that the devices have: cuDNN's on GPUs, one of our own on TPUs.

The sequences of this field are short: a picture's patches or a caption's tokens fit a TPU's vector
memory whole, with all heads. So the kernel tiles nothing and keeps no running maximum; scores and
weights never reach the chip's main memory, and the backward pass, which makes them again, needs
nothing kept but what the kernel was given.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from clipx.types import batch_axes

_NEVER = -1e30  # a masked score: finite, so that no difference is NaN
_ROOM = 12 * 2**20  # bytes of vector memory that blocks and scores may take, of 16 MiB by default
_MOST = 28 * 2**20  # the same for one row that needs more; every TPU from v4 on has 32 MiB


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
) -> Float[Array, "b t h d"]:
    """Scaled dot-product attention; of row i only the first `lengths[i]` keys are seen.

    Softmax in float32, or float64 for float64 inputs. cuDNN's fused kernel where the device, the
    dtype and the shapes have one.
    """
    if q.dtype == jnp.float64:  # jax.nn's softmax is float32 whatever the inputs
        logits = jnp.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
        seen = jnp.ones(logits.shape[-2:], bool)
        seen = jnp.tril(seen) if causal else seen
        if lengths is not None:
            seen = seen & (jnp.arange(k.shape[1]) < lengths[:, None])[:, None, None]
        return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(logits, where=seen), v)
    fused = (
        q.dtype == jnp.bfloat16
        and q.shape == k.shape
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= 128
        and _has_cudnn_attention()
    )
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        is_causal=causal,
        key_value_seq_lengths=lengths,
        implementation="cudnn" if fused else None,
    )


def has_kernel(rows: int, tokens: int, heads: int, head_width: int, dtype) -> bool:
    """Whether `packed_attention` can take such rows on the mesh that is set."""
    split, per = _tensor(heads), math.prod(_mesh_sizes(batch_axes()))
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32) or rows % per:
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
    """Scaled dot-product self-attention on TPUs; of row i only the first `lengths[i]` keys are
    seen. Head h's queries, keys and values lie side by side, [heads, 3, c / heads] flattened.

    Products are of the inputs' dtype and summed in float32; softmax runs in float32. Rows stay on
    the devices that hold them, and heads on those of the mesh's `tensor` axis. `interpret` runs the
    kernel anywhere, slowly.
    """
    b, n, _ = qkv.shape
    lengths = jnp.full(b, n, jnp.int32) if lengths is None else lengths.astype(jnp.int32)
    return _attend((heads, causal, interpret), qkv, lengths)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static, qkv, lengths):
    return _attend_forward(static, qkv, lengths)[0]


def _attend_forward(static, qkv, lengths):
    return _spread(_forward_kernel, static, 1 / 3, lengths, qkv), (qkv, lengths)


def _attend_backward(static, residuals, dy):
    qkv, lengths = residuals
    return _spread(_backward_kernel, static, 1, lengths, qkv, dy), None


_attend.defvjp(_attend_forward, _attend_backward)


def _mesh_sizes(axes: tuple[str, ...]) -> list[int]:
    mesh = jax.sharding.get_abstract_mesh()
    return [mesh.shape[a] for a in axes]


def _tensor(heads: int) -> int:
    """Over how many devices heads are spread."""
    mesh = jax.sharding.get_abstract_mesh()
    size = mesh.shape.get("tensor", 1)
    return size if heads % size == 0 else 1


def _spread(kernel, static, share, lengths, *inputs):
    """What the kernel makes of each device's rows and heads: `share` of the first input's width."""
    heads, causal, interpret = static
    split = _tensor(heads)
    run = functools.partial(_call, kernel, heads // split, causal, interpret, share)
    axes = batch_axes()
    if split == 1 and not axes:
        return run(lengths, *inputs)
    spec = P(axes or None, None, "tensor" if split > 1 else None)
    # nothing here meets across devices: the partitioner cannot look into a kernel, that is all
    spread = jax.shard_map(
        run,
        in_specs=(P(axes or None), *[spec] * len(inputs)),
        out_specs=spec,
        check_vma=False,
    )
    return spread(lengths, *inputs)


def _vector_memory(tokens: int, heads: int, head_width: int, dtype) -> tuple[int, int]:
    """Bytes that the backward kernel takes: of the blocks of one row, held twice, and of scores."""
    item = jnp.dtype(dtype).itemsize
    padded, width = -(-tokens // 16) * 16, -(-3 * heads * head_width // 128) * 128
    return 2 * padded * width * item * 7 // 3, 6 * padded * (-(-tokens // 128) * 128) * 4


def _call(kernel, heads, causal, interpret, share, lengths, *inputs):
    b, n, width = inputs[0].shape
    dtype, d = inputs[0].dtype, width // heads // 3
    row, scores = _vector_memory(n, heads, d, dtype)
    rows = max(r for r in range(1, b + 1) if b % r == 0 and (r == 1 or r * row + scores <= _ROOM))
    out = jax.ShapeDtypeStruct((b, n, round(width * share)), dtype)
    products = 2 if kernel is _forward_kernel else 5
    weights = b * heads * n * n
    cost = pl.CostEstimate(  # of what is done: masked scores too
        flops=weights * (2 * products * d + 3 * products),
        transcendentals=weights,
        bytes_accessed=sum(x.size * dtype.itemsize for x in (*inputs, out)),
    )

    def spec(x):
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


def _dot(a, b, contract):
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def _seen(n, length, causal):
    """Which keys [n, n] a query sees."""
    key = jax.lax.broadcasted_iota(jnp.int32, (n, n), 1)
    seen = key < length
    return seen & (key <= jax.lax.broadcasted_iota(jnp.int32, (n, n), 0)) if causal else seen


def _parts(qkv, row, head, d):
    """A head's queries, keys and values [n, d]."""
    first = 3 * d * head
    return (qkv[row, :, first + i * d : first + (i + 1) * d] for i in range(3))


def _weights(q, k, seen):
    """exp(scores - maximum), and 1 / its sum over keys."""
    scores = jnp.where(seen, _dot(q, k, ((1,), (1,))) * q.shape[-1] ** -0.5, _NEVER)
    e = jnp.exp(scores - jnp.max(scores, axis=1, keepdims=True))
    return e, 1 / jnp.sum(e, axis=1, keepdims=True)


def _forward_kernel(lengths, qkv, out, *, heads, causal):
    rows, n, c = out.shape
    d = c // heads
    first = pl.program_id(0) * rows

    def attend(row, _):
        seen = _seen(n, lengths[first + row], causal)
        for head in range(heads):
            q, k, v = _parts(qkv, row, head, d)
            e, share = _weights(q, k, seen)
            y = _dot(e.astype(v.dtype), v, ((1,), (0,))) * share
            out[row, :, d * head : d * (head + 1)] = y.astype(out.dtype)

    jax.lax.fori_loop(0, rows, attend, None)


def _backward_kernel(lengths, qkv, dy, out, *, heads, causal):
    rows, n, c = dy.shape
    d = c // heads
    first = pl.program_id(0) * rows

    def attend(row, _):
        seen = _seen(n, lengths[first + row], causal)
        for head in range(heads):
            q, k, v = _parts(qkv, row, head, d)
            g = dy[row, :, d * head : d * (head + 1)]
            e, share = _weights(q, k, seen)
            p = e * share
            dp = _dot(g, v, ((1,), (1,)))
            ds = p * (dp - jnp.sum(p * dp, axis=1, keepdims=True)) * d**-0.5
            p, ds = p.astype(q.dtype), ds.astype(q.dtype)
            grads = _dot(ds, k, ((1,), (0,))), _dot(ds, q, ((0,), (0,))), _dot(p, g, ((0,), (0,)))
            for i, grad in enumerate(grads):
                place = (3 * head + i) * d
                out[row, :, place : place + d] = grad.astype(out.dtype)

    jax.lax.fori_loop(0, rows, attend, None)
