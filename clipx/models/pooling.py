"""Attention pooling: learned queries that attend to all tokens."""

from __future__ import annotations

import jax.numpy as jnp
from flax import linen as nn
from jax.nn import initializers
from jaxtyping import Float

from clipx.models.layers import MLP, Activation, LayerNorm, PoolAttention
from clipx.types import Array


class MapHead(nn.Module):
    """Attention pooling with one learned query, then a residual MLP (big_vision, models/vit.py,
    MAPHead)."""

    heads: int
    mlp_width: int
    activation: Activation
    norm_eps: float
    dtype: str

    @nn.compact
    def __call__(self, tokens: Float[Array, "b n c"]) -> Float[Array, "b c"]:
        width = tokens.shape[-1]
        glorot = initializers.glorot_uniform()
        probe = self.param("probe", glorot, (1, width), jnp.float32).astype(self.dtype)
        x = PoolAttention(self.heads, self.dtype, glorot, name="attn")(
            jnp.broadcast_to(probe, (tokens.shape[0], 1, width)), tokens
        )[:, 0]
        x = nn.Dense(width, dtype=self.dtype, kernel_init=glorot, name="out")(x)
        y = LayerNorm(epsilon=self.norm_eps, dtype=self.dtype, name="ln")(x)
        inits = (glorot, glorot)
        return x + MLP(self.mlp_width, self.activation, self.dtype, inits, name="mlp")(y)


class QueryPool(nn.Module):
    """CoCa's attention pooling (Yu et al. 2022, arXiv:2205.01917, section 3.2; open_clip,
    AttentionalPooler): of `queries` learned queries of `width` channels, the first one's output.
    The others are those of the captioner, which reads their outputs; they get no gradient here."""

    width: int
    queries: int
    heads: int
    norm_eps: float
    dtype: str

    @nn.compact
    def __call__(self, tokens: Float[Array, "b n c"]) -> Float[Array, "b d"]:
        glorot = initializers.glorot_uniform()
        normal = initializers.normal(1.0)
        table = self.param("queries", normal, (self.queries, self.width), jnp.float32)

        def norm(name: str, x: Array) -> Array:
            return LayerNorm(epsilon=self.norm_eps, dtype=self.dtype, name=name)(x)

        query = norm("ln_q", table[:1].astype(self.dtype))
        query = jnp.broadcast_to(query, (tokens.shape[0], *query.shape))
        x = PoolAttention(self.heads, self.dtype, glorot, name="attn")(
            query, norm("ln_kv", tokens)
        )[:, 0]
        return nn.Dense(self.width, dtype=self.dtype, kernel_init=glorot, name="out")(x)
