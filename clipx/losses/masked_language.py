"""Masked language modelling: hide words of a text, and the cross-entropy of predicting them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int, Int32, Key

from clipx.losses.tiles import Axes, spread
from clipx.types import Array, PyTree

_TILE = 2**24  # logits of one tile when `chunk` is None: 64 MiB of float32


def mask_tokens(
    tokens: Int[Array, "*b n"],
    key: Key[Array, "*b"] | Key[Array, ""],
    *,
    vocab_size: int,
    mask_id: int,
    special_ids: Sequence[int],
    rate: float = 0.15,
) -> tuple[Int[Array, "*b n"], Bool[Array, "*b n"]]:
    """(tokens with some of them corrupted, mask of the selected positions).

    `masked_lm` predicts the original tokens at the selected positions. Each word is selected with
    probability `rate`. Of the selected words 80 % become `mask_id`, 10 % a random id, and 10 % stay
    as they are (BERT, arXiv 1810.04805, section 3.1). A row may have nothing selected.

    A word is a token before the first end mark that is not special. The end mark is the last of
    `special_ids` that is not `mask_id`; `TokenizerConfig.special_ids` has this order. So padding is
    never selected, even if its id is also that of a word, as CLIP's 0 is "!". Random ids are never
    special. (DeCLIP's code may sample the end mark, and the tower then pools there.)

    `key` is either one key per row, and a row's result depends on its own key alone; or one key,
    which is split into one per row.
    """
    special = sorted({*special_ids, mask_id})
    end = [i for i in special_ids if i != mask_id][-1]
    tokens = jnp.asarray(tokens)

    def row(tokens: Array, key: Array) -> tuple[Array, Array]:
        select, kind, sample = jax.random.split(key, 3)
        ended = jnp.cumsum(tokens == end) > 0
        selected = jax.random.bernoulli(select, rate, tokens.shape)
        selected &= ~ended & ~jnp.isin(tokens, jnp.array(special))
        random_ids = jax.random.randint(
            sample, tokens.shape, 0, vocab_size - len(special), dtype=tokens.dtype
        )
        for i in special:  # in ascending order, so that each step skips one special id
            random_ids += random_ids >= i
        kind = jax.random.uniform(kind, tokens.shape)
        replaced = jnp.where(kind < 0.8, mask_id, jnp.where(kind < 0.9, random_ids, tokens))
        return jnp.where(selected, replaced, tokens), selected

    if key.ndim < tokens.ndim - 1:
        key = jax.random.split(key, tokens.shape[:-1])
    for _ in range(tokens.ndim - 1):
        row = jax.vmap(row)
    return row(tokens, key)


def _tiles(selected: Array, chunk: int) -> tuple[Array, Array]:
    """(positions in tiles [count chunk], number of tiles with a selected position).

    The selected positions come first. The last tile is filled up with positions beyond the end,
    where `_rows` and `_write` read and write nothing.
    """
    (size,) = selected.shape
    order = jnp.argsort(~selected, stable=True)
    order = jnp.pad(order, (0, -size % chunk), constant_values=size)
    return order.reshape(-1, chunk), -(-jnp.sum(selected) // chunk)


def _rows(x: Array, at: Array, beyond: int | float = 0) -> Array:
    return x.at[at].get(mode="fill", fill_value=beyond)


def _write(x: Array, at: Array, values: Array) -> Array:
    return x.at[at].set(values.astype(x.dtype), mode="drop", unique_indices=True)


def _zeros(shape: tuple[int, ...], dtype: DTypeLike, axes: Axes) -> Array:
    """Zeros for a loop's carry, which shard_map wants device-varying from the start."""
    zeros = jnp.zeros(shape, dtype)
    return lax.pcast(zeros, axes, to="varying") if axes else zeros


def _matmul(equation: str, x: Array, y: Array) -> Array:
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.einsum(equation, x, y, preferred_element_type=wide, precision=lax.Precision.HIGHEST)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _cross_entropy(
    states: Float[Array, "p c"],
    kernel: Float[Array, "c v"],
    bias: Float[Array, " v"],
    targets: Int[Array, " p"],
    selected: Bool[Array, " p"],
    chunk: int,
    axes: Axes,
) -> Float[Array, " p"]:
    """The cross-entropy of each selected position, 0 at the others.

    The gradient is written by hand for two reasons: the loops end with the selected positions, and
    the kernel's gradient is summed in float32 whatever the dtype of `states`.
    """
    return _forward(states, kernel, bias, targets, selected, chunk, axes)[0]


def _forward(
    states: Array,
    kernel: Array,
    bias: Array,
    targets: Array,
    selected: Array,
    chunk: int,
    axes: Axes,
) -> tuple[Array, tuple[Array, ...]]:
    wide = jnp.promote_types(states.dtype, jnp.float32)
    order, count = _tiles(selected, chunk)
    narrow = kernel.astype(states.dtype)

    def tile(i: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        loss, lse = carry
        at = order[i]
        logits = _matmul("pc,cv->pv", _rows(states, at), narrow) + bias.astype(wide)
        target = jnp.take_along_axis(logits, _rows(targets, at)[:, None], axis=1)[:, 0]
        total = jax.nn.logsumexp(logits, axis=1)
        losses = jnp.where(_rows(selected, at), total - target, 0)
        return _write(loss, at, losses), _write(lse, at, total)

    zeros = _zeros(selected.shape, wide, axes)
    loss, lse = lax.fori_loop(0, count, tile, (zeros, zeros))
    return loss, (states, kernel, bias, targets, selected, lse)


def _backward(
    chunk: int, axes: Axes, residuals: tuple[Array, ...], slope: Array
) -> tuple[Array, Array, Array, None, None]:
    states, kernel, bias, targets, selected, lse = residuals
    wide = jnp.promote_types(states.dtype, jnp.float32)
    order, count = _tiles(selected, chunk)
    narrow = kernel.astype(states.dtype)
    slope = jnp.where(selected, slope, 0)

    def tile(i: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        d_states, d_kernel, d_bias = carry
        at = order[i]
        x = _rows(states, at)
        logits = _matmul("pc,cv->pv", x, narrow) + bias.astype(wide)
        d_logits = jnp.exp(logits - _rows(lse, at, jnp.inf)[:, None])
        d_logits = d_logits.at[jnp.arange(chunk), _rows(targets, at)].add(-1, unique_indices=True)
        d_logits = d_logits * _rows(slope, at)[:, None]
        d_bias += jnp.sum(d_logits, axis=0)
        d_logits = d_logits.astype(x.dtype)
        d_kernel += _matmul("pc,pv->cv", x, d_logits)
        return _write(d_states, at, _matmul("pv,cv->pc", d_logits, narrow)), d_kernel, d_bias

    zeros = (
        _zeros(states.shape, states.dtype, axes),
        _zeros(kernel.shape, wide, axes),
        _zeros(bias.shape, wide, axes),
    )
    d_states, d_kernel, d_bias = lax.fori_loop(0, count, tile, zeros)
    return d_states, d_kernel.astype(kernel.dtype), d_bias.astype(bias.dtype), None, None


_cross_entropy.defvjp(_forward, _backward)


def masked_lm(
    states: Float[Array, "b n c"],
    kernel: Float[Array, "c v"],
    bias: Float[Array, " v"],
    targets: Int[Array, "b n"],
    selected: Bool[Array, "b n"],
    *,
    chunk: int | None = None,
) -> tuple[Float[Array, " b"], Int32[Array, " b"]]:
    """(summed cross-entropy of each row's selected positions, in nats; their number per row).

    The loss of a batch is Σ total / max(Σ count, 1). Every row is computed alone, so an objective
    may call this in `embed`. (DeCLIP's code takes a mean per device, which is NaN on a device with
    nothing selected.)

    `states` are the tower's tokens; `kernel` and `bias` are those of the vocabulary's output layer.
    Logits exist only for selected positions, `chunk` of them at a time (None picks the number), and
    the backward pass recomputes them. Products are taken in the dtype of `states`, sums in float32
    at least. Raises `ValueError` if the number of devices does not divide the rows. Source: BERT
    (arXiv 1810.04805), section 3.1.
    """
    chunk = max(1, min(targets.size, chunk or _TILE // kernel.shape[1]))

    def local(axes: Axes, rows: PyTree, scalars: PyTree) -> tuple[Array, Array]:
        states, targets, selected = rows
        if axes:  # each device has its own gradient of the head; pcast's transpose sums them
            scalars = jax.tree.map(lambda x: lax.pcast(x, axes, to="varying"), scalars)
        b, n, c = states.shape
        flat = (targets.reshape(-1), selected.reshape(-1))
        size = min(chunk, b * n)
        loss = _cross_entropy(states.reshape(b * n, c), *scalars, *flat, size, axes)
        loss = loss.reshape(b, n)  # pyright: ignore[reportAttributeAccessIssue]
        return jnp.sum(loss, axis=1), jnp.sum(selected, axis=1, dtype=jnp.int32)

    rows, shared = jax.tree.map(jnp.asarray, ((states, targets, selected), (kernel, bias)))
    return spread(local, rows, shared)
