"""EVA's vision transformers, and Meta's Perception Encoder, which is built like them."""

from __future__ import annotations

import functools
from typing import Any, ClassVar, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.nn import initializers
from jaxtyping import Float, Key

from clipx.config.ranges import Depth, Epsilon, Pixels, Ratio, Width
from clipx.models import cpu
from clipx.models.attention import attention
from clipx.models.base import PositionTable, Tower
from clipx.models.gated import GatedMLP
from clipx.models.layers import (
    MLP,
    Affine,
    LayerNorm,
    Lora,
    check,
    mean_tokens,
    reduction_dtype,
    torch_bias,
    torch_uniform,
)
from clipx.models.pooling import MapHead
from clipx.types import Array, constrain_rows

_normal = initializers.truncated_normal(0.02)
_WAVELENGTH = 10_000.0  # the longest of the rotations


def rotations(
    side: int, channels: int, reference: int, first: float, x_first: bool
) -> tuple[Float[np.ndarray, "n c"], Float[np.ndarray, "n c"]]:
    """(sine, cosine) by which the `channels` of a head rotate at each patch of a grid: one half by
    its row, the other by its column (Fang et al. 2023, arXiv:2303.11331, section 2.2; timm,
    build_rotary_pos_embed).

    Coordinates count from `first`, and are scaled to a grid of `reference` patches a side. x_first:
    whether the column comes first.
    """
    bands = 1 / _WAVELENGTH ** (np.arange(channels // 4) / (channels // 4))
    axis = (np.arange(side) + first) / side * reference
    rows, columns = np.meshgrid(axis, axis, indexing="ij")
    order = (columns, rows) if x_first else (rows, columns)
    angles = np.concatenate([x.reshape(-1, 1) * bands for x in order], axis=1)
    angles = np.repeat(angles, 2, axis=1)
    return np.sin(angles), np.cos(angles)


def _rotated(x: Float[Array, "b n h d"], sine: np.ndarray, cosine: np.ndarray) -> Array:
    """x, whose last tokens are the patches, with each pair of their channels rotated."""
    first = x.shape[1] - len(sine)
    wide = x[:, first:].astype(reduction_dtype(x.dtype))
    turned = jnp.stack([-wide[..., 1::2], wide[..., ::2]], axis=-1).reshape(wide.shape)
    sine, cosine = (table[:, None].astype(wide.dtype) for table in (sine, cosine))
    wide = wide * cosine + turned * sine
    return jnp.concatenate([x[:, :first], wide.astype(x.dtype)], axis=1)


class EvaAttention(nn.Module):
    """Self-attention with rotated queries and keys. Keys have a bias only with `key_bias`; with
    `norm_eps` there is a LayerNorm before the output projection."""

    heads: int
    key_bias: bool
    norm_eps: float | None
    dtype: str
    lora: Lora | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n c"], turn: tuple[np.ndarray, np.ndarray] | None
    ) -> Float[Array, "b n c"]:
        width = x.shape[-1]
        shape = (self.heads, width // self.heads)
        dense = functools.partial(Affine, dtype=self.dtype, kernel_init=_normal, lora=self.lora)
        qkv = dense((3, *shape), use_bias=False, name="qkv")(x)
        parts = (2 + self.key_bias, *shape)
        bias = self.param("bias", initializers.zeros, parts, jnp.float32).astype(qkv.dtype)
        qkv = qkv + (bias if self.key_bias else jnp.insert(bias, 1, 0, axis=0))
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        if turn is not None:
            q, k = _rotated(q, *turn), _rotated(k, *turn)
        y = attention(q, k, v).reshape(x.shape)
        if self.norm_eps is not None:
            y = LayerNorm(epsilon=self.norm_eps, dtype=self.dtype, name="ln")(y)
        y = y.reshape(*y.shape[:2], *shape)
        return dense((width,), inputs=2, name="out")(y)


class BlockKind(NamedTuple):
    """What the blocks of a tower have in common: fields of `EVA`."""

    heads: int
    mlp_width: int
    gated: bool
    sub_norms: bool
    post_norm: bool
    key_bias: bool
    norm_eps: float
    dtype: str
    lora: Lora | None


class EvaBlock(nn.Module):
    """A block whose norms stand before attention and MLP, or (`post_norm`) behind them."""

    kind: BlockKind

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n c"], turn: tuple[np.ndarray, np.ndarray] | None
    ) -> Float[Array, "b n c"]:
        t = self.kind
        norm = functools.partial(LayerNorm, epsilon=t.norm_eps, dtype=t.dtype)
        inner = t.norm_eps if t.sub_norms else None
        attend = EvaAttention(t.heads, t.key_bias, inner, t.dtype, t.lora, name="attn")
        if t.gated:
            mlp = GatedMLP(t.mlp_width, "silu", t.dtype, inner, lora=t.lora, name="mlp")
        else:
            mlp = MLP(t.mlp_width, "gelu", t.dtype, lora=t.lora, name="mlp")
        if t.post_norm:
            x = cpu.hold(x + norm(name="ln_1")(attend(x, turn)))
            return cpu.hold(constrain_rows(x + norm(name="ln_2")(mlp(x))))
        x = cpu.hold(x + attend(norm(name="ln_1")(x), turn))
        return cpu.hold(constrain_rows(x + mlp(norm(name="ln_2")(x))))


class EVA(Tower):
    """EVA's vision transformer (timm, eva.py). The defaults are EVA-02's B/16 of EVA-CLIP.

    Queries and keys of patches are rotated (`rotary`) by their place in a grid of `rotary_side`
    patches a side, counted from `rotary_first`; there are learned positions too. `gated` MLPs are
    SwiGLUs; `sub_norms` are LayerNorms inside of attention and MLP. EVA-01 has neither, EVA-02's
    E/14 has `post_norm`. The Perception Encoder (Bolya et al. 2025, arXiv:2504.13181) has
    `key_bias`, `pre_norm`, `rotary_x_first`, plain MLPs and `pool="attention"`.

    `pool` picks `backbone`: "class" is the class token after the last norm, "mean" the mean of the
    patches before it, "attention" a `MapHead` of all tokens after it. `tokens` of the result are
    the patches before that norm. Images must be normalised.
    """

    adaptable: ClassVar[bool] = True

    image_size: Pixels = 224  # pixels
    patch: Pixels = 16  # pixels
    width: Width = 768
    depth: Depth = 12
    heads: Width = 12
    mlp_ratio: Ratio = 8 / 3
    gated: bool = True
    sub_norms: bool = True
    post_norm: bool = False
    key_bias: bool = False
    rotary: bool = True
    rotary_side: Pixels = 16  # patches
    rotary_first: Literal[0, 1] = 0
    rotary_x_first: bool = False
    class_token: bool = True
    pre_norm: bool = False
    pool: Literal["class", "mean", "attention"] = "class"
    pool_heads: Width = 8
    pool_ratio: Ratio = 4.0  # of the MLP of pool="attention"
    norm_eps: Epsilon = 1e-6
    remat: Literal["none", "full"] = "none"  # "full": the backward pass recomputes blocks

    @nn.nowrap
    def check(self) -> None:
        super().check()
        pools = self.pool == "attention"
        for name, each in [("heads", 4), *[("pool_heads", 1)] * pools]:
            found = f"{getattr(self, name)} heads for a width of {self.width}"
            expected = f"heads of a multiple of {each} channels"
            check(self.width % (getattr(self, name) * each) == 0, self.at(name), found, expected)
        size, patch = self.image_size, self.patch
        found = f"{size} pixels with a patch of {patch}"
        check(size % patch == 0, self.at("image_size"), found, "a multiple of the patch")
        expected = "a class token for pool='class'"
        check(self.class_token or self.pool != "class", self.at("class_token"), False, expected)

    @property
    def mlp_width(self) -> int:
        """Channels of a block's hidden layer."""
        return int(self.width * self.mlp_ratio)

    @property
    def backbone_width(self) -> int:
        return self.width

    @property
    def position_table(self) -> PositionTable:
        """One row for the class token, if there is one, then one per patch."""
        side = self.image_size // self.patch
        return PositionTable(("positional_embedding",), int(self.class_token), (side, side))

    @property
    def unseen_settings(self) -> dict[str, Any]:
        names = ["heads", "post_norm", "norm_eps", "pool", "rotary"]
        names += ["rotary_side", "rotary_first", "rotary_x_first"] * self.rotary
        names += ["pool_heads"] * (self.pool == "attention")
        return {name: getattr(self, name) for name in names}

    @nn.compact
    def features(
        self,
        x: Float[Array, "b h w 3"],
        *,
        train: bool = False,
        keys: Key[Array, " b"] | None = None,
    ) -> tuple[Float[Array, "b c"], Float[Array, "b n c"]]:
        self.check_images(x, self.image_size)
        side, rows, first = self.image_size // self.patch, x.shape[0], int(self.class_token)
        x = x.reshape(rows, side, self.patch, side, self.patch, 3).swapaxes(2, 3)
        bias = {"use_bias": not self.pre_norm, "bias_init": torch_bias(self.patch**2 * 3)}
        x = nn.DenseGeneral(
            self.width,
            axis=(-3, -2, -1),
            dtype=self.dtype,
            kernel_init=torch_uniform,
            **bias,
            name="patch_embedding",
        )(x).reshape(rows, side * side, self.width)
        if self.class_token:
            token = self.param("class_embedding", _normal, (self.width,), jnp.float32)
            token = jnp.broadcast_to(token.astype(x.dtype), (rows, 1, self.width))
            x = jnp.concatenate([token, x], axis=1)
        position = self.param("positional_embedding", _normal, x.shape[1:], jnp.float32)
        x = x + position.astype(x.dtype)
        norm = functools.partial(LayerNorm, epsilon=self.norm_eps, dtype=self.dtype)
        x = norm(name="ln_pre")(x) if self.pre_norm else x
        turn = None
        if self.rotary:
            channels, place = self.width // self.heads, (self.rotary_first, self.rotary_x_first)
            turn = rotations(side, channels, self.rotary_side, *place)
        block = nn.remat(EvaBlock) if self.remat == "full" else EvaBlock
        kind = BlockKind(*(getattr(self, field) for field in BlockKind._fields))
        for i in range(self.depth):
            x = block(kind, name=f"block_{i}")(x, turn)
        tokens, ln_post = x[:, first:], norm(name="ln_post")
        if self.pool == "class":
            return ln_post(x[:, 0]), tokens
        if self.pool == "mean":
            return ln_post(mean_tokens(tokens)), tokens
        kind = (self.pool_heads, int(self.width * self.pool_ratio), "gelu", self.norm_eps)
        return MapHead(*kind, self.dtype, name="pool")(ln_post(x)), tokens
