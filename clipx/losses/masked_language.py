"""Masked language modelling: hide words of a text, and the cross-entropy of what they were."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Int32, Key

from clipx.losses.tiles import spread

_TILE = 2**24  # logits of one tile when `chunk` is None: 64 MiB of float32


def mask_tokens(
    tokens: Int[Array, "*b n"],
    key: Key[Array, "*b"],
    *,
    vocab_size: int,
    mask_id: int,
    special_ids: Sequence[int],
    rate: float = 0.15,
) -> tuple[Int[Array, "*b n"], Bool[Array, "*b n"]]:
    """The tokens with some of them corrupted, and True where one was selected, which is where
    `masked_lm` asks for the original.

    Each word of a text is selected with probability `rate`; of the selected, 80 % become `mask_id`,
    10 % a random id, 10 % stay (BERT, arXiv 1810.04805, section 3.1). Words are what stands before
    the first end mark and is not special; the end mark is the last of `special_ids`, `mask_id`
    aside, as `TokenizerConfig.special_ids` has them. So padding is never selected even where its id
    is a word's, as CLIP's 0 is "!". A random id is never special: DeCLIP's code may draw the end
    mark, and then pools there. A row may have nothing selected.

    `key` is one key per row, on which alone that row's result depends, or one key, from which the
    rows' keys are split.
    """
    special = sorted({*special_ids, mask_id})
    end = [i for i in special_ids if i != mask_id][-1]
    tokens = jnp.asarray(tokens)

    def row(tokens, key):
        select, kind, draw = jax.random.split(key, 3)
        ended = jnp.cumsum(tokens == end) > 0
        selected = jax.random.bernoulli(select, rate, tokens.shape)
        selected &= ~ended & ~jnp.isin(tokens, jnp.array(special))
        drawn = jax.random.randint(
            draw, tokens.shape, 0, vocab_size - len(special), dtype=tokens.dtype
        )
        for i in special:  # ascending, so that each steps over one hole
            drawn += drawn >= i
        kind = jax.random.uniform(kind, tokens.shape)
        replaced = jnp.where(kind < 0.8, mask_id, jnp.where(kind < 0.9, drawn, tokens))
        return jnp.where(selected, replaced, tokens), selected

    if key.ndim < tokens.ndim - 1:
        key = jax.random.split(key, tokens.shape[:-1])
    for _ in range(tokens.ndim - 1):
        row = jax.vmap(row)
    return row(tokens, key)


def _tiles(selected, chunk):
    """All positions, the selected ones first, in whole tiles, and how many tiles hold one. What
    fills the last tile lies beyond the end, where nothing is read or written."""
    (size,) = selected.shape
    order = jnp.argsort(~selected, stable=True)
    order = jnp.pad(order, (0, -size % chunk), constant_values=size)
    return order.reshape(-1, chunk), -(-jnp.sum(selected) // chunk)


def _rows(x, at, beyond=0):
    return x.at[at].get(mode="fill", fill_value=beyond)


def _write(x, at, values):
    return x.at[at].set(values.astype(x.dtype), mode="drop", unique_indices=True)


def _zeros(shape, dtype, axes):
    """A loop's carry must be as device-varying going in as it is coming out."""
    zeros = jnp.zeros(shape, dtype)
    return lax.pcast(zeros, axes, to="varying") if axes else zeros


def _matmul(equation, x, y):
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.einsum(equation, x, y, preferred_element_type=wide, precision=lax.Precision.HIGHEST)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _cross_entropy(states, kernel, bias, targets, selected, chunk, axes):
    """Of each selected position, 0 elsewhere. Positions p: [p c], [c v], [v], [p], [p] -> [p].

    Written with its own gradient, so that loops end where the selected positions do, and so that
    the kernel's gradient is summed in float32 for any states.
    """
    return _forward(states, kernel, bias, targets, selected, chunk, axes)[0]


def _forward(states, kernel, bias, targets, selected, chunk, axes):
    wide = jnp.promote_types(states.dtype, jnp.float32)
    order, count = _tiles(selected, chunk)
    narrow = kernel.astype(states.dtype)

    def tile(i, carry):
        loss, lse = carry
        at = order[i]
        logits = _matmul("pc,cv->pv", _rows(states, at), narrow) + bias.astype(wide)
        target = jnp.take_along_axis(logits, _rows(targets, at)[:, None], axis=1)[:, 0]
        total = jax.nn.logsumexp(logits, axis=1)
        mine = jnp.where(_rows(selected, at), total - target, 0)
        return _write(loss, at, mine), _write(lse, at, total)

    zeros = _zeros(selected.shape, wide, axes)
    loss, lse = lax.fori_loop(0, count, tile, (zeros, zeros))
    return loss, (states, kernel, bias, targets, selected, lse)


def _backward(chunk, axes, residuals, slope):
    states, kernel, bias, targets, selected, lse = residuals
    wide = jnp.promote_types(states.dtype, jnp.float32)
    order, count = _tiles(selected, chunk)
    narrow = kernel.astype(states.dtype)
    slope = jnp.where(selected, slope, 0)

    def tile(i, carry):
        d_states, d_kernel, d_bias = carry
        at = order[i]
        x = _rows(states, at)
        logits = _matmul("pc,cv->pv", x, narrow) + bias.astype(wide)
        share = jnp.exp(logits - _rows(lse, at, jnp.inf)[:, None])
        share = share.at[jnp.arange(chunk), _rows(targets, at)].add(-1, unique_indices=True)
        share = share * _rows(slope, at)[:, None]
        d_bias += jnp.sum(share, axis=0)
        share = share.astype(x.dtype)
        d_kernel += _matmul("pc,pv->cv", x, share)
        return _write(d_states, at, _matmul("pv,cv->pc", share, narrow)), d_kernel, d_bias

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
    """The summed cross-entropy of each row's selected positions, in nats, and their number.

    Row by row, so that it may be called where rows are embedded; the loss over a batch is
    Σ total / max(Σ count, 1). Only the selected positions meet the vocabulary, `chunk` of them at
    a time (None picks it), and their logits are computed again in the backward pass. Products are
    taken in the dtype of `states`, sums in float32 at least. DeCLIP's code takes a mean per device
    and is NaN where a device has nothing selected.
    """
    chunk = max(1, min(targets.size, chunk or _TILE // kernel.shape[1]))

    def local(axes, rows, scalars):
        states, targets, selected = rows
        if axes:  # each device has a gradient of its own, summed outside
            scalars = jax.tree.map(lambda x: lax.pcast(x, axes, to="varying"), scalars)
        b, n, c = states.shape
        flat = (targets.reshape(-1), selected.reshape(-1))
        size = min(chunk, b * n)
        loss = _cross_entropy(states.reshape(b * n, c), *scalars, *flat, size, axes)
        return jnp.sum(loss.reshape(b, n), axis=1), jnp.sum(selected, axis=1, dtype=jnp.int32)

    rows, shared = jax.tree.map(jnp.asarray, ((states, targets, selected), (kernel, bias)))
    return spread(local, rows, shared)
