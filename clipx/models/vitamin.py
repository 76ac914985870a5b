"""ViTamin: two convolutional stages below a vision transformer with gated MLPs."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.nn import initializers
from jaxtyping import Float, Key

from clipx.config.ranges import Depth, Epsilon, Pixels, Ratio, Width
from clipx.models import cpu
from clipx.models.base import PositionTable, Tower
from clipx.models.depthwise import depthwise
from clipx.models.gated import GatedMLP
from clipx.models.layers import (
    LayerNorm,
    Lora,
    activate,
    check,
    check_name,
    mean_tokens,
    torch_uniform,
)
from clipx.models.transformer import SelfAttention
from clipx.types import Array, constrain_rows

# Chen et al. 2024 (arXiv:2404.02132), table 11; timm, vitamin.py: channels of the two
# convolutional stages and of the transformer, its depth and heads, whether it has positions
VARIANTS = {
    "small": ((64, 128, 384), 14, 6, True),
    "base": ((128, 256, 768), 14, 12, True),
    "large": ((160, 320, 1024), 31, 16, True),
    "xlarge": ((192, 384, 1152), 32, 16, False),
}
STAGES, EXPANSION, STRIDE = (2, 4), 4, 16  # blocks of the stages; their MLPs; pixels of a token
_normal = initializers.truncated_normal(0.02)


def _conv(width: int, size: int, stride: int, dtype: str, name: str) -> nn.Conv:
    """A convolution with a bias, padded as torch does."""
    init = initializers.variance_scaling(2.0, "fan_out", "normal")
    padding = [(size // 2, size // 2)] * 2
    options: dict[str, Any] = {"strides": stride, "padding": padding, "kernel_init": init}
    options["conv_general_dilated"] = cpu.convolution
    return nn.Conv(width, (size, size), dtype=dtype, name=name, **options)


class ConvBlock(nn.Module):
    """A LayerNorm, a 1x1 convolution that widens, a depthwise one, and a 1x1 convolution that
    narrows, added to the input; with a `stride` to its 3x3 mean of every second pixel."""

    width: int
    stride: int
    norm_eps: float
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b i j d"]:
        options = {"dtype": self.dtype, "kernel_init": torch_uniform}
        dense = functools.partial(nn.Dense, dot_general=cpu.dot_general, **options)
        before, inner = x, self.width * EXPANSION
        if self.stride > 1:
            before = _pooled(before)
        if before.shape[-1] != self.width:
            before = dense(self.width, name="shortcut")(before)
        y = LayerNorm(epsilon=self.norm_eps, dtype=self.dtype, name="ln")(x)
        y = activate(dense(inner, name="expand")(y), "gelu")
        kernel = self.param("kernel", _normal, (3, 3, 1, inner), jnp.float32).astype(self.dtype)
        bias = self.param("bias", initializers.zeros, (inner,), jnp.float32).astype(self.dtype)
        y = activate(depthwise(y, kernel, self.stride, (1, 1)) + bias, "gelu")
        return cpu.hold(constrain_rows(dense(self.width, name="project")(y) + before))


def _pooled(x: Float[Array, "b h w c"]) -> Float[Array, "b i j c"]:
    """The mean of the 3x3 pixels around every second one, those outside of the image left out."""

    def total(x: Float[Array, "b h w c"]) -> Float[Array, "b i j c"]:
        # as nn.avg_pool does, whose padding converters to ONNX miss
        around = ((0, 0), (1, 1), (1, 1), (0, 0))
        return jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 3, 3, 1), (1, 2, 2, 1), around)

    return total(x) / total(jnp.ones((1, *x.shape[1:3], 1)))


class ViTaminBlock(nn.Module):
    """A pre-LN block with a gated MLP, which has a LayerNorm of its own."""

    heads: int
    mlp_width: int
    norm_eps: float
    dtype: str
    lora: Lora | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        norm = functools.partial(LayerNorm, epsilon=self.norm_eps, dtype=self.dtype)
        inits = (initializers.glorot_uniform(), torch_uniform)
        attend = SelfAttention(self.heads, False, self.dtype, inits, lora=self.lora, name="attn")
        x = cpu.hold(x + attend(norm(name="ln_1")(x), None))
        kind = {"norm_input": True, "lora": self.lora, "name": "mlp"}
        mlp = GatedMLP(self.mlp_width, "gelu", self.dtype, self.norm_eps, **kind)
        return cpu.hold(constrain_rows(x + mlp(norm(name="ln_2")(x))))


class ViTamin(Tower):
    """ViTamin (Chen et al. 2024, arXiv:2404.02132) under its sizes' names.

    `widths`, `depth` and `heads` override the variant's channels of the three stages, blocks of the
    transformer and their heads; `positions` whether its tokens, one for 16 x 16 pixels, have
    learned positions. `backbone` is the LayerNorm of the mean of the tokens, `tokens` are those
    before it. Images must be normalised.
    """

    adaptable: ClassVar[bool] = True

    variant: str = "base"
    image_size: Pixels = 224  # pixels
    widths: tuple[Width, ...] | None = None
    depth: Depth | None = None
    heads: Width | None = None
    positions: bool | None = None
    mlp_ratio: Ratio = 2.0
    norm_eps: Epsilon = 1e-6

    @nn.nowrap
    def check(self) -> None:
        super().check()
        check_name(self.at("variant"), self.variant, VARIANTS)
        widths, _, heads, _ = self.shape
        whole = len(widths) == 3 and all(isinstance(n, int) and n > 0 for n in widths)
        check(whole, self.at("widths"), widths, "channels of three stages")
        found = f"{heads} heads for a width of {widths[-1]}"
        check(widths[-1] % heads == 0, self.at("heads"), found, "a number that divides the width")
        fits = self.image_size % STRIDE == 0
        check(fits, self.at("image_size"), self.image_size, f"a multiple of {STRIDE}")

    @property
    def shape(self) -> tuple[tuple[int, ...], int, int, bool]:
        """Widths, depth, heads, and whether there are positions."""
        widths, depth, heads, positions = VARIANTS[self.variant]
        return (
            self.widths or widths,
            self.depth or depth,
            self.heads or heads,
            positions if self.positions is None else self.positions,
        )

    @property
    def backbone_width(self) -> int:
        """The width of the transformer."""
        return self.shape[0][-1]

    @property
    def position_table(self) -> PositionTable | None:
        """One row for each token, if they have positions."""
        side = self.image_size // STRIDE
        return PositionTable(("positional_embedding",), 0, (side, side)) if self.shape[3] else None

    @property
    def unseen_settings(self) -> dict[str, Any]:
        return {"heads": self.shape[2], "norm_eps": self.norm_eps}

    @nn.compact
    def features(
        self,
        x: Float[Array, "b h w 3"],
        *,
        train: bool = False,
        keys: Key[Array, " b"] | None = None,
    ) -> tuple[Float[Array, "b c"], Float[Array, "b n c"]]:
        self.check_images(x, self.image_size)
        (*stages, width), depth, heads, positions = self.shape
        norm = functools.partial(LayerNorm, epsilon=self.norm_eps, dtype=self.dtype)
        x = _conv(stages[0], 3, 2, self.dtype, "conv1")(x)
        x = activate(norm(name="ln_stem")(x), "gelu")
        x = _conv(stages[0], 3, 1, self.dtype, "conv2")(x)
        for i, (channels, count) in enumerate(zip(stages, STAGES)):
            for j in range(count):
                kind = (channels, 1 if j else 2, self.norm_eps, self.dtype)
                x = ConvBlock(*kind, name=f"stage_{i}_{j}")(x)
        x = _conv(width, 3, 2, self.dtype, "conv3")(norm(name="ln_conv")(x))
        x = x.reshape(x.shape[0], -1, width)
        if positions:
            table = self.param("positional_embedding", _normal, x.shape[1:], jnp.float32)
            x = x + table.astype(x.dtype)
        inner = int(width * self.mlp_ratio)
        for i in range(depth):
            kind = (heads, inner, self.norm_eps, self.dtype, self.lora)
            x = ViTaminBlock(*kind, name=f"block_{i}")(x)
        return norm(name="ln_post")(mean_tokens(x)), x
