"""ConvNeXt: tiny to xxlarge."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax.nn import initializers
from jaxtyping import Float, Key

from clipx.config.ranges import Depth, Epsilon, Pixels, Width, WidthOrZero
from clipx.models import cpu
from clipx.models.base import Tower
from clipx.models.depthwise import depthwise
from clipx.models.layers import (
    LayerNorm,
    activate,
    check,
    check_name,
    mean_tokens,
    torch_bias,
    torch_uniform,
)
from clipx.models.transformer import LayerScale
from clipx.types import Array, constrain_rows

# Liu et al. 2022 (arXiv:2201.03545), section 3; "xxlarge" is OpenCLIP's: blocks of the four stages,
# channels of the first, which double from stage to stage
VARIANTS = {
    "tiny": ((3, 3, 9, 3), 96),
    "small": ((3, 3, 27, 3), 96),
    "base": ((3, 3, 27, 3), 128),
    "large": ((3, 3, 27, 3), 192),
    "xlarge": ((3, 3, 27, 3), 256),
    "xxlarge": ((3, 4, 30, 3), 384),
}
KERNEL, STEM = 7, 4  # pixels of a block's convolution, and of the first one
_normal = initializers.truncated_normal(0.02)


class Patches(nn.Module):
    """A convolution whose stride is its kernel: a dense layer over each square of pixels. Pixels at
    the right and at the bottom that fill no square are left out. `kernel` is [k, k, c, width]."""

    size: int
    width: int
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b i j d"]:
        k, side, channels = self.size, x.shape[1] // self.size, x.shape[-1]
        x = x[:, : side * k, : side * k].reshape(-1, side, k, side, k, channels)
        return nn.DenseGeneral(
            self.width,
            axis=(-3, -2, -1),
            dtype=self.dtype,
            kernel_init=_normal,
            name="conv",
        )(x.swapaxes(2, 3))


class ConvNeXtBlock(nn.Module):
    """A depthwise convolution, a LayerNorm and an MLP, whose result is scaled and added."""

    scale: float
    norm_eps: float
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        width = x.shape[-1]
        kernel = self.param("kernel", _normal, (KERNEL, KERNEL, 1, width), jnp.float32)
        bias = self.param("bias", initializers.zeros, (width,), jnp.float32)
        y = depthwise(x, kernel.astype(self.dtype), 1, (KERNEL // 2, KERNEL // 2))
        y = LayerNorm(epsilon=self.norm_eps, dtype=self.dtype, name="ln")(y + bias.astype(y.dtype))
        options = {"dtype": self.dtype, "kernel_init": _normal}
        dense = functools.partial(nn.Dense, dot_general=cpu.dot_general, **options)
        y = dense(width, name="proj")(activate(dense(4 * width, name="fc")(y), "gelu"))
        return cpu.hold(constrain_rows(x + LayerScale(self.scale, self.dtype, name="scale")(y)))


class ConvNeXt(Tower):
    """ConvNeXt (Liu et al. 2022, arXiv:2201.03545), under its sizes' names.

    `width` and `blocks` override the variant's channels of the first stage and blocks of the four
    stages. `backbone` is the mean of the last feature map after a LayerNorm; with `hidden`, a dense
    layer of so many channels and GELU on top of it, as open_clip's "mlp" projections have. `tokens`
    are that map before the norm. Images must be normalised.
    """

    variant: str = "base"
    image_size: Pixels = 224  # pixels
    width: Width | None = None
    blocks: tuple[Depth, ...] | None = None
    hidden: WidthOrZero = 0  # of a dense layer below the projection; 0: none
    layer_scale: Epsilon = 1e-6  # initial factor of what a block adds
    norm_eps: Epsilon = 1e-6

    @nn.nowrap
    def check(self) -> None:
        super().check()
        check_name(self.at("variant"), self.variant, VARIANTS)
        blocks = self.shape[0]
        whole = len(blocks) == 4 and all(isinstance(n, int) and n > 0 for n in blocks)
        check(whole, self.at("blocks"), blocks, "blocks of four stages")
        least = STEM * 2 ** (len(blocks) - 1)
        large = self.image_size >= least
        check(large, self.at("image_size"), self.image_size, f"at least {least} pixels")

    @property
    def shape(self) -> tuple[tuple[int, ...], int]:
        """Blocks of the stages and channels of the first."""
        blocks, width = VARIANTS[self.variant]
        return self.blocks or blocks, self.width or width

    @property
    def last_width(self) -> int:
        """Channels of the last feature map."""
        blocks, width = self.shape
        return width * 2 ** (len(blocks) - 1)

    @property
    def backbone_width(self) -> int:
        """Channels of the dense layer, or of the last feature map."""
        return self.hidden or self.last_width

    @property
    def unseen_settings(self) -> dict[str, Any]:
        return {"norm_eps": self.norm_eps}

    @nn.compact
    def features(
        self,
        x: Float[Array, "b h w 3"],
        *,
        train: bool = False,
        keys: Key[Array, " b"] | None = None,
    ) -> tuple[Float[Array, "b c"], Float[Array, "b n c"]]:
        self.check_images(x, self.image_size)
        blocks, width = self.shape
        norm = functools.partial(LayerNorm, epsilon=self.norm_eps, dtype=self.dtype)
        x = norm(name="ln_stem")(Patches(STEM, width, self.dtype, name="stem")(x))
        for i, count in enumerate(blocks):
            if i:
                x = Patches(2, width * 2**i, self.dtype, name=f"down_{i}")(norm(name=f"ln_{i}")(x))
            for j in range(count):
                x = ConvNeXtBlock(
                    self.layer_scale, self.norm_eps, self.dtype, name=f"stage_{i}_{j}"
                )(x)
        tokens = x.reshape(x.shape[0], -1, x.shape[-1])
        y = norm(name="ln_post")(mean_tokens(tokens))
        if self.hidden:
            init = {"kernel_init": torch_uniform, "bias_init": torch_bias(self.last_width)}
            y = activate(nn.Dense(self.hidden, dtype=self.dtype, **init, name="hidden")(y), "gelu")
        return y, tokens
