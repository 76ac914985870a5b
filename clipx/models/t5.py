"""The encoder of T5 and mT5 as a text tower."""

from __future__ import annotations

import functools
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
from flax import linen as nn
from jax.nn import initializers
from jaxtyping import Bool, Float, Int32, Key

from clipx.config.ranges import Count, CountOrZero, Depth, Epsilon, Rate, Width, WidthOrZero
from clipx.models import cpu
from clipx.models.base import Tower
from clipx.models.bert import relative_buckets
from clipx.models.gated import GatedMLP
from clipx.models.layers import (
    Affine,
    Lora,
    activate,
    check,
    drop,
    dropout_keys,
    mean_tokens,
    reduction_dtype,
    text_lengths,
)
from clipx.types import Array, constrain_rows

_small = initializers.normal(0.02)


class RMSNorm(nn.Module):
    """Division by the root of the mean square, in float32 at least, without a mean or a bias (Zhang
    & Sennrich 2019, arXiv:1910.07467)."""

    epsilon: float
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "*r c"]) -> Float[Array, "*r c"]:
        wide = x.astype(reduction_dtype(x.dtype))
        square = jnp.mean(wide * wide, axis=-1, keepdims=True)
        scale = self.param("scale", initializers.ones, x.shape[-1:], jnp.float32)
        return (wide / jnp.sqrt(square + self.epsilon)).astype(self.dtype) * scale.astype(
            self.dtype
        )


class T5Attention(nn.Module):
    """Self-attention without biases of its layers, whose scores are not scaled and get a bias for
    the distance of two tokens. Dropout acts on the attention weights."""

    heads: int
    head_width: int
    dropout: float
    dtype: str
    lora: Lora | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n c"],
        bias: Float[Array, "h n n"],
        valid: Bool[Array, "b n"],
        keys: Key[Array, " b"] | None,
        index: int,
    ) -> Float[Array, "b n c"]:
        dense = functools.partial(
            Affine, dtype=self.dtype, kernel_init=_small, lora=self.lora, use_bias=False
        )
        qkv = dense((3, self.heads, self.head_width), name="qkv")(x)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        wide = reduction_dtype(x.dtype)
        logits = jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=wide)
        logits = jnp.where(valid[:, None, None], logits + bias.astype(wide), -jnp.inf)
        weights = nn.softmax(logits).reshape(x.shape[0], -1, x.shape[1])
        weights = drop(weights, self.dropout, keys, index).reshape(logits.shape).astype(v.dtype)
        y = jnp.einsum("bhts,bshd->bthd", weights, v)
        return dense((x.shape[-1],), inputs=2, name="out")(y)


class T5Block(nn.Module):
    """One block, whose norms stand before attention and MLP."""

    heads: int
    head_width: int
    mlp_width: int
    norm_eps: float
    dropout: float
    dtype: str
    lora: Lora | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n c"],
        bias: Float[Array, "h n n"],
        valid: Bool[Array, "b n"],
        keys: Key[Array, " b"] | None,
        index: int,
    ) -> Float[Array, "b n c"]:
        norm = functools.partial(RMSNorm, self.norm_eps, self.dtype)
        sizes = (self.heads, self.head_width, self.dropout, self.dtype, self.lora)
        y = T5Attention(*sizes, name="attn")(norm(name="ln_1")(x), bias, valid, keys, index)
        x = cpu.hold(x + drop(y, self.dropout, keys, index + 1))
        kind = {"use_bias": False, "lora": self.lora, "name": "mlp"}
        mlp = GatedMLP(self.mlp_width, "gelu_tanh", self.dtype, **kind)
        y = drop(mlp(norm(name="ln_2")(x)), self.dropout, keys, index + 2)
        return cpu.hold(constrain_rows(x + y))


class T5(Tower):
    """The encoder of mT5 (Xue et al. 2021, arXiv:2010.11934), which is T5's of version 1.1, of any
    size. The defaults are mT5-base.

    `backbone` is the mean of the tokens that are not padding, or (`pool="first"`) the first token,
    after the last norm; with `dense_width`, a dense layer without a bias and GELU on top of it.
    `tokens` are all tokens after that norm. Padding is masked: the tokens after the last `eot_id`,
    or, in a row without one, the `pad_id`s at its end. Positions are distances, so that a text may
    have any length.
    """

    from_tokenizer: ClassVar[tuple[str, ...]] = ("vocab_size", "context", "eot_id", "pad_id")
    adaptable: ClassVar[bool] = True

    vocab_size: Count = 250112
    context: Count = 77  # tokens per text, as the tokenizer makes them
    width: Width = 768
    depth: Depth = 12
    heads: Width = 12
    head_width: Width = 64
    mlp_width: Width = 2048
    relative_buckets: Count = 32  # rows of the attention bias by distance
    norm_eps: Epsilon = 1e-6
    pool: Literal["mean", "first"] = "mean"
    dense_width: WidthOrZero = 0  # width of a dense layer on what is pooled; 0: none
    eot_id: CountOrZero = 1
    pad_id: CountOrZero = 0
    dropout: Rate = 0.1

    @nn.nowrap
    def check(self) -> None:
        super().check()
        buckets = self.relative_buckets
        even = buckets >= 4 and buckets % 4 == 0
        check(even, self.at("relative_buckets"), buckets, "a multiple of 4")

    @property
    def backbone_width(self) -> int:
        """The width of the dense layer; without one that of a block."""
        return self.dense_width or self.width

    @property
    def ignores_padding(self) -> bool:
        return True

    @property
    def unseen_settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("norm_eps", "pool")}

    @nn.compact
    def features(
        self, x: Int32[Array, "b n"], *, train: bool = False, keys: Key[Array, " b"] | None = None
    ) -> tuple[Float[Array, "b c"], Float[Array, "b n c"]]:
        ids, length = x, x.shape[1]
        keys = dropout_keys(self.dropout, train, keys)
        ends = text_lengths(ids, self.eot_id, self.pad_id, last=self.eot_id != self.pad_id)
        valid = jnp.arange(length) < ends[:, None]
        shape = (self.vocab_size, self.width)
        table = self.param("token_embedding", initializers.normal(1.0), shape, jnp.float32)
        x = drop(jnp.take(table, ids, axis=0).astype(self.dtype), self.dropout, keys, 0)
        rows = (self.relative_buckets, self.heads)
        biases = self.param("relative_bias", _small, rows, jnp.float32)
        bias = jnp.moveaxis(biases[relative_buckets(length, self.relative_buckets)], -1, 0)
        for i in range(self.depth):
            x = T5Block(
                self.heads,
                self.head_width,
                self.mlp_width,
                self.norm_eps,
                self.dropout,
                self.dtype,
                self.lora,
                name=f"block_{i}",
            )(x, bias, valid, keys, 3 * i + 1)
        tokens = RMSNorm(self.norm_eps, self.dtype, name="ln_final")(x)
        y = mean_tokens(tokens, valid) if self.pool == "mean" else tokens[:, 0]
        if self.dense_width:
            dense = functools.partial(nn.Dense, dtype=self.dtype, kernel_init=_small)
            y = activate(dense(self.dense_width, use_bias=False, name="dense")(y), "gelu")
        return y, tokens
