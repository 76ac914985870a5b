"""BERT as a text tower, and the encoders that are built like it: RoBERTa, XLM-R, DistilBERT, MPNet,
MiniLM and those of sentence-transformers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.nn import initializers
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int, Int32, Key

from clipx.config.ranges import Count, CountOrZero, Depth, Epsilon, Rate, Ratio, Width, WidthOrZero
from clipx.models import cpu
from clipx.models.base import Tower
from clipx.models.layers import (
    Activation,
    Affine,
    LayerNorm,
    Lora,
    activate,
    check,
    drop,
    dropout_keys,
    mean_tokens,
    reduction_dtype,
    text_lengths,
    unit,
)
from clipx.types import Array, constrain_rows

_normal = initializers.normal(0.02)
_RELATIVE_DISTANCE = 128  # tokens apart, from where on MPNet's attention bias is the same


class BertAttention(nn.Module):
    """Self-attention with dropout on the attention weights.

    Parameters have the layout of `transformer.SelfAttention`.
    """

    heads: int
    dropout: float
    dtype: str
    lora: Lora | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n c"],
        valid: Bool[Array, "b n"],
        keys: Key[Array, " b"] | None,
        index: int,
        bias: Float[Array, "h n n"] | None = None,
    ) -> Float[Array, "b n c"]:
        width, (rows, length) = x.shape[-1], valid.shape
        shape = (3, self.heads, width // self.heads)
        dense = functools.partial(Affine, dtype=self.dtype, kernel_init=_normal, lora=self.lora)
        q, k, v = jnp.moveaxis(dense(shape, name="qkv")(x), 2, 0)
        wide = reduction_dtype(x.dtype)
        logits = jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=wide)
        logits = logits * shape[-1] ** -0.5
        if bias is not None:
            logits = logits + bias.astype(wide)
        seen = jnp.where(valid[:, None, None], logits, -jnp.inf)
        weights = nn.softmax(seen).reshape(rows, -1, length)
        weights = drop(weights, self.dropout, keys, index).reshape(logits.shape).astype(v.dtype)
        y = jnp.einsum("bhts,bshd->bthd", weights, v)
        return dense((width,), inputs=2, name="out")(y)


class BertMLP(nn.Module):
    width: int
    activation: Activation
    dtype: str
    lora: Lora | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        dense = functools.partial(Affine, dtype=self.dtype, kernel_init=_normal, lora=self.lora)
        y = activate(dense((self.width,), name="fc")(x), self.activation)
        return dense((x.shape[-1],), name="proj")(y)


class BertBlock(nn.Module):
    """One post-LN block: the norm comes after the sum."""

    heads: int
    mlp_width: int
    activation: Activation
    norm_eps: float
    dropout: float
    dtype: str
    lora: Lora | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n c"],
        valid: Bool[Array, "b n"],
        keys: Key[Array, " b"] | None,
        index: int,
        bias: Float[Array, "h n n"] | None = None,
    ) -> Float[Array, "b n c"]:
        norm = functools.partial(LayerNorm, epsilon=self.norm_eps, dtype=self.dtype)
        attention = BertAttention(self.heads, self.dropout, self.dtype, self.lora, name="attn")
        y = drop(attention(x, valid, keys, index, bias), self.dropout, keys, index + 1)
        x = norm(name="ln_attn")(cpu.hold(x + y))
        y = BertMLP(self.mlp_width, self.activation, self.dtype, self.lora, name="mlp")(x)
        y = drop(y, self.dropout, keys, index + 2)
        return constrain_rows(norm(name="ln_mlp")(cpu.hold(x + y)))


def relative_buckets(length: int, count: int) -> Int[np.ndarray, "n n"]:
    """The row of MPNet's table of `count` biases for each (query, key): half of the rows for keys
    before the query, half for keys behind it; of each half the first rows for one distance each,
    the others for ranges that grow with the distance (transformers, `relative_position_bucket`).
    """
    half = count // 2
    exact = half // 2
    behind = np.arange(length)[None] - np.arange(length)[:, None]
    distance = np.abs(behind)
    scale = np.log(np.maximum(distance, 1).astype(np.float32) / exact)
    scale = scale / math.log(_RELATIVE_DISTANCE / exact) * (half - exact)
    far = np.minimum(exact + scale.astype(np.int64), half - 1)
    return np.where(distance < exact, distance, far) + half * (behind > 0)


class BERT(Tower):
    """BERT (Devlin et al. 2019, arXiv 1810.04805) and its kin, of any depth and size. The defaults
    are BERT-base with its pooler.

    `backbone` of the result is what `pool` makes of the last layer's tokens, then a dense layer and
    `normalize` where they are set, as the modules of sentence-transformers do: with `normalize` its
    rows have unit length, and the projection acts on those. "pooler" is BERT's own, tanh(W x + b)
    of the first token, which must be the tokenizer's start mark; "cls" is that token, "mean" and
    "max" are over the tokens that are not padding. `tokens` are the last layer's.

    Padding is masked in attention: the tokens after the last `eot_id`, or, in a row without one,
    the `pad_id`s at its end. Texts may be shorter than `positions`. Every token has the first
    segment type. Dropout acts on embeddings, on attention weights, and on the output of both halves
    of a block.

    RoBERTa and XLM-R have `segments=1` and `norm_eps=1e-5`; DistilBERT has `segments=0` and no
    pooler; MPNet has `segments=0`, `relative_buckets=32` and `norm_eps=1e-5`. Their tables of
    positions begin here with the row of the first token: RoBERTa's file has `pad_id` + 1 rows in
    front of it that no token uses.
    """

    from_tokenizer: ClassVar[tuple[str, ...]] = ("vocab_size", "context", "eot_id", "pad_id")
    needs_start_mark: ClassVar[bool] = True
    adaptable: ClassVar[bool] = True

    vocab_size: Count = 30522
    context: Count = 30  # tokens per text, as the tokenizer makes them
    positions: Count = 512  # rows of the position table
    segments: CountOrZero = 2  # rows of the segment table; 0: no table
    relative_buckets: CountOrZero = 0  # rows of the attention bias by distance; 0: no bias
    width: Width = 768
    depth: Depth = 12
    heads: Width = 12
    mlp_ratio: Ratio = 4.0
    activation: Activation = "gelu"
    norm_eps: Epsilon = 1e-12
    pool: Literal["pooler", "cls", "mean", "max"] = "pooler"
    dense_width: WidthOrZero = 0  # width of a dense layer on what is pooled; 0: none
    dense_bias: bool = True
    dense_activation: Literal["tanh", "gelu", "identity"] = "tanh"
    normalize: bool = False  # rows of `backbone` have unit length
    eot_id: CountOrZero = 102
    pad_id: CountOrZero = 0
    dropout: Rate = 0.1

    @nn.nowrap
    def check(self) -> None:
        super().check()
        check(
            self.width % self.heads == 0,
            self.at("heads"),
            f"{self.heads} heads for a width of {self.width}",
            "a number that divides the width",
        )
        check(
            self.positions >= self.context,
            self.at("positions"),
            f"{self.positions}, for texts of {self.context} tokens",
            f"at least {self.context}",
        )
        buckets = self.relative_buckets
        check(
            not buckets or (buckets >= 4 and buckets % 4 == 0),
            self.at("relative_buckets"),
            str(buckets),
            "0, or a multiple of 4",
        )

    @property
    def backbone_width(self) -> int:
        """The width of the dense layer; without one that of a block."""
        return self.dense_width or self.width

    @property
    def ignores_padding(self) -> bool:
        return True

    @property
    def unseen_settings(self) -> dict[str, Any]:
        """What no array tells. `positions` does not change the output: texts use the table's first
        rows."""
        names = ("heads", "activation", "norm_eps", "pool", "dense_activation", "normalize")
        return {name: getattr(self, name) for name in names}

    @nn.compact
    def features(
        self, x: Int32[Array, "b n"], *, train: bool = False, keys: Key[Array, " b"] | None = None
    ) -> tuple[Float[Array, "b c"], Float[Array, "b n c"]]:
        ids, length = x, x.shape[1]
        if length > self.positions:
            raise ValueError(
                f"{self.at('positions')}={self.positions}, but the texts {x.shape} are longer"
            )
        keys = dropout_keys(self.dropout, train, keys)
        ends = text_lengths(ids, self.eot_id, self.pad_id, last=self.eot_id != self.pad_id)
        valid = jnp.arange(length) < ends[:, None]
        x = drop(self._embedded(ids), self.dropout, keys, 0)
        bias = self._relative_bias(length)
        for i in range(self.depth):
            x = BertBlock(
                self.heads,
                round(self.width * self.mlp_ratio),
                self.activation,
                self.norm_eps,
                self.dropout,
                self.dtype,
                self.lora,
                name=f"block_{i}",
            )(x, valid, keys, 1 + 3 * i, bias)
        return self._pooled(x, valid), x

    def _table(self, name: str, rows: int, init: Callable = _normal) -> Array:
        return self.param(name, init, (rows, self.width), jnp.float32)

    def _embedded(self, ids: Int32[Array, "b n"]) -> Float[Array, "b n c"]:
        """The sum of all embeddings of a token, normalised. It is summed before the cast to
        `dtype`. An id outside the table gives NaN, not another token."""

        def zero_padding(key: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
            return _normal(key, shape, dtype).at[self.pad_id].set(0)

        x = jnp.take(self._table("token_embedding", self.vocab_size, zero_padding), ids, axis=0)
        x = x + self._table("positional_embedding", self.positions)[: ids.shape[1]]
        if self.segments:
            x = x + self._table("type_embedding", self.segments)[0]
        return LayerNorm(epsilon=self.norm_eps, dtype=self.dtype, name="ln_embedding")(x)

    def _relative_bias(self, length: int) -> Float[Array, "h n n"] | None:
        """What attention adds for the distance of two tokens, the same in every block."""
        if not self.relative_buckets:
            return None
        shape = (self.relative_buckets, self.heads)
        table = self.param("relative_bias", _normal, shape, jnp.float32)
        return jnp.moveaxis(table[relative_buckets(length, self.relative_buckets)], -1, 0)

    def _pooled(self, x: Float[Array, "b n c"], valid: Bool[Array, "b n"]) -> Float[Array, "b c"]:
        if self.pool == "mean":
            y = mean_tokens(x, valid)
        elif self.pool == "max":
            y = jnp.where(valid[..., None], x, -jnp.inf).max(axis=1)
        else:
            y = x[:, 0]
        dense = functools.partial(nn.Dense, dtype=self.dtype, kernel_init=_normal)
        if self.pool == "pooler":
            y = jnp.tanh(dense(self.width, name="pooler")(y))
        if self.dense_width:
            y = dense(self.dense_width, use_bias=self.dense_bias, name="dense")(y)
            if self.dense_activation != "identity":
                y = jnp.tanh(y) if self.dense_activation == "tanh" else activate(y, "gelu")
        return unit(y).astype(y.dtype) if self.normalize else y
