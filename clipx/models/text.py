"""CLIP's text transformer."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import jax.numpy as jnp
from flax import linen as nn
from jax.nn import initializers
from jaxtyping import Float, Int32, Key

from clipx.config.ranges import Count, CountOrZero, Depth, Epsilon, Rate, Ratio, Width
from clipx.models.base import PositionTable, Tower
from clipx.models.layers import (
    Activation,
    LayerNorm,
    check,
    dropout_keys,
    mean_tokens,
    text_lengths,
)
from clipx.models.transformer import Transformer
from clipx.types import Array


class TextTransformer(Tower):
    """CLIP's text transformer (clip/model.py), or, with `causal=False`, a bidirectional one.

    `pool` picks `backbone`: "eot" is the token at the first `eot_id` (in a row without one, the
    last token), "first" and "last" the first and last token, "mean" the mean. "class" is CoCa's: a
    learned token behind the text. No token then attends to the token after a `pad_id`, which is how
    open_clip's published models were trained. `tokens` of the result are all tokens after the last
    LayerNorm. Texts may be shorter than `context`.

    With `mask_padding`, padding is masked in attention and left out of the pooling. Padding is
    everything after the first `eot_id`; in a row without one it is the run of `pad_id`s at the end.
    (An id alone does not tell padding: CLIP's `pad_id` is also the id of "!".)
    """

    from_tokenizer: ClassVar[tuple[str, ...]] = ("vocab_size", "context", "eot_id", "pad_id")
    adaptable: ClassVar[bool] = True

    vocab_size: Count = 49408
    context: Count = 77  # tokens
    width: Width = 512
    depth: Depth = 12
    heads: Width = 8
    mlp_ratio: Ratio = 4.0
    causal: bool = True
    pool: Literal["eot", "first", "last", "mean", "class"] = "eot"
    eot_id: CountOrZero = 49407
    pad_id: CountOrZero = 0
    mask_padding: bool = False
    activation: Activation = "gelu"
    norm_eps: Epsilon = 1e-5
    dropout: Rate = 0.0
    scan: bool = False
    remat: Literal["none", "dots", "full"] = "none"

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
            self.pool != "class" or not self.mask_padding,
            self.at("mask_padding"),
            "True with pool='class'",
            "False: such a tower already leaves out padding",
        )
        if self.pool == "eot" or self.mask_padding:
            check(
                0 <= self.eot_id < self.vocab_size,
                self.at("eot_id"),
                f"{self.eot_id} with a vocabulary of {self.vocab_size}",
                "an id of the vocabulary",
            )

    @property
    def backbone_width(self) -> int:
        """The width of a block."""
        return self.width

    @property
    def ignores_padding(self) -> bool:
        return self.mask_padding or (self.causal and self.pool == "eot")

    @property
    def idle_ids(self) -> tuple[str, ...]:
        ends = self.pool == "eot" or self.mask_padding
        pads = self.pool == "class" or self.mask_padding
        return ("eot_id",) * (not ends) + ("pad_id",) * (not pads)

    @property
    def position_table(self) -> PositionTable:
        """One row per token."""
        return PositionTable(("positional_embedding",), 0, (self.context,))

    @property
    def unseen_settings(self) -> dict[str, Any]:
        """Fields of the tower. `mask_padding` counts only if the tower is not causal."""
        names = ("activation", "norm_eps", "heads", "pool", "causal")
        settings = {name: getattr(self, name) for name in names}
        return settings | {"mask_padding": self.mask_padding and not self.causal}

    @nn.compact
    def features(
        self, x: Int32[Array, "b n"], *, train: bool = False, keys: Key[Array, " b"] | None = None
    ) -> tuple[Float[Array, "b c"], Float[Array, "b n c"]]:
        ids, length = x, x.shape[1]
        if length > self.context:
            raise ValueError(
                f"{self.at('context')}={self.context}, but the texts {x.shape} are longer"
            )
        table = self.param(
            "token_embedding",
            initializers.normal(0.02),
            (self.vocab_size, self.width),
            jnp.float32,
        )
        # Looked up before the cast, so that the gradient of a frequent token is summed in float32.
        # An id outside the table gives NaN, not another token.
        x = jnp.take(table, ids, axis=0).astype(self.dtype)
        position = self.param(
            "positional_embedding",
            initializers.normal(0.01),
            (self.context, self.width),
            jnp.float32,
        )
        x = x + position[:length].astype(x.dtype)
        seen = None
        if self.pool == "class":
            x = jnp.concatenate([x, self._class_token(x)], axis=1)
            seen = jnp.pad(ids != self.pad_id, ((0, 0), (1, 0)), constant_values=True)
        is_eot = ids == self.eot_id
        eot = jnp.where(is_eot.any(axis=1), is_eot.argmax(axis=1), length - 1)
        lengths = None
        if self.mask_padding:
            lengths = text_lengths(ids, self.eot_id, self.pad_id).astype(jnp.int32)
        x = Transformer(
            depth=self.depth,
            heads=self.heads,
            mlp_width=round(self.width * self.mlp_ratio),
            activation=self.activation,
            norm_eps=self.norm_eps,
            dropout=self.dropout,
            causal=self.causal,
            scan=self.scan,
            remat=self.remat,
            dtype=self.dtype,
            lora=self.lora,
            name="transformer",
        )(x, lengths, dropout_keys(self.dropout, train, keys), seen)
        tokens = LayerNorm(epsilon=self.norm_eps, dtype=self.dtype, name="ln_final")(x)
        if self.pool == "class":
            return tokens[:, -1], tokens[:, :-1]
        if self.pool == "first":
            pooled = tokens[:, 0]
        elif self.pool == "mean":
            valid = None if lengths is None else jnp.arange(length) < lengths[:, None]
            pooled = mean_tokens(tokens, valid)
        elif self.pool == "last" and lengths is None:
            pooled = tokens[:, -1]
        else:
            pooled_at = eot if lengths is None or self.pool == "eot" else lengths - 1
            pooled = jnp.take_along_axis(tokens, pooled_at[:, None, None], axis=1)[:, 0]
        return pooled, tokens

    def _class_token(self, x: Float[Array, "b n c"]) -> Float[Array, "b 1 c"]:
        """The token of `pool="class"`, with its own position."""
        normal = initializers.normal(0.01)
        token, position = (
            self.param(f"class_{name}", normal, (self.width,), jnp.float32)
            for name in ("embedding", "position")
        )
        token = token.astype(x.dtype) + position.astype(x.dtype)
        return jnp.broadcast_to(token, (x.shape[0], 1, self.width))
