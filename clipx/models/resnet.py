"""Residual networks: CLIP's modified ResNet and torchvision's plain one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax.nn import initializers
from jaxtyping import Float, Key

from clipx.config.ranges import Depth, Epsilon, Pixels, Width
from clipx.models import cpu
from clipx.models.base import PositionTable, Tower
from clipx.models.layers import (
    BatchNorm,
    PoolAttention,
    check,
    check_name,
    mean_tokens,
    torch_bias,
    torch_uniform,
)
from clipx.types import Array, constrain_rows

# Radford et al. 2021 (arXiv:2103.00020), table 19 and section 2.4: blocks per stage, stem width
MODIFIED = {
    "RN50": ((3, 4, 6, 3), 64),
    "RN101": ((3, 4, 23, 3), 64),
    "RN50x4": ((4, 6, 10, 6), 80),
    "RN50x16": ((6, 8, 18, 8), 96),
    "RN50x64": ((3, 15, 36, 10), 128),
}
# He et al. 2015 (arXiv:1512.03385), table 1: blocks per stage, and whether they are bottlenecks
PLAIN = {
    "resnet18": ((2, 2, 2, 2), False),
    "resnet34": ((3, 4, 6, 3), False),
    "resnet50": ((3, 4, 6, 3), True),
    "resnet101": ((3, 4, 23, 3), True),
    "resnet152": ((3, 8, 36, 3), True),
}
_he_normal = initializers.variance_scaling(2, "fan_out", "normal")  # torchvision's, for ResNets


def _average(x: Float[Array, "b h w c"], stride: int) -> Float[Array, "b i j c"]:
    size = (stride, stride)
    return nn.avg_pool(x, window_shape=size, strides=size) if stride > 1 else x


class Residual(nn.Module):
    """One residual block: two 3x3 convolutions, or a 1x1-3x3-1x1 bottleneck.

    A `modified` block strides by average pooling, in front of its last convolution and of the
    shortcut's (clip/model.py, Bottleneck). A plain block strides in its 3x3 convolution and in the
    shortcut's (torchvision, ResNet v1.5).
    """

    width: int
    stride: int
    bottleneck: bool
    modified: bool
    zero_gamma: bool
    norm_eps: float
    dtype: str
    pooled_shortcut: bool = False  # a plain block's shortcut strides by average pooling

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b i j k"]:
        conv, norm = _conv_and_norm(self.modified, self.norm_eps, self.dtype, train)
        last_scale = initializers.zeros if self.zero_gamma else initializers.ones
        conv_stride = 1 if self.modified else self.stride
        if self.bottleneck:
            width = self.width * 4
            y = nn.relu(norm("bn1")(conv("conv1", self.width, 1)(x)))
            y = nn.relu(norm("bn2")(conv("conv2", self.width, 3, conv_stride)(y)))
            y = _average(y, self.stride) if self.modified else y
            y = norm("bn3", last_scale)(conv("conv3", width, 1)(y))
        else:
            width = self.width
            y = nn.relu(norm("bn1")(conv("conv1", width, 3, conv_stride)(x)))
            y = norm("bn2", last_scale)(conv("conv2", width, 3)(y))
        if self.stride > 1 or x.shape[-1] != width:
            if self.pooled_shortcut and self.stride > 1:
                size = (self.stride, self.stride)
                x = nn.avg_pool(
                    x, window_shape=size, strides=size, padding="SAME", count_include_pad=False
                )
                conv_stride = 1
            x = _average(x, self.stride) if self.modified else x
            x = norm("bn_shortcut")(conv("conv_shortcut", width, 1, conv_stride)(x))
        return cpu.hold(constrain_rows(nn.relu(x + y)))


def _conv_and_norm(
    modified: bool, norm_eps: float, dtype: str, train: bool
) -> tuple[Callable, Callable]:
    """Functions that make a convolution, without bias and padded as in torch, and a BatchNorm."""

    def conv(name: str, width: int, size: int, stride: int = 1) -> nn.Conv:
        return nn.Conv(
            width,
            (size, size),
            strides=stride,
            padding=size // 2,
            use_bias=False,
            dtype=dtype,
            kernel_init=torch_uniform if modified else _he_normal,
            conv_general_dilated=cpu.convolution,
            name=name,
        )

    def norm(name: str, scale_init: Any = initializers.ones) -> Callable:
        return functools.partial(
            BatchNorm(dtype, norm_eps, scale_init=scale_init, name=name), train=train
        )

    return conv, norm


class AttentionPool(nn.Module):
    """Attention pooling: the mean token attends to itself and to all tokens.

    This is AttentionPool2d of clip/model.py without its output projection, which is the tower's.
    """

    heads: int
    dtype: str

    @nn.compact
    def __call__(self, tokens: Float[Array, "b n c"]) -> Float[Array, "b c"]:
        width = tokens.shape[-1]
        tokens = jnp.concatenate([tokens.mean(axis=1, keepdims=True), tokens], axis=1)
        normal = initializers.normal(width**-0.5)
        position = self.param("positional_embedding", normal, tokens.shape[1:], jnp.float32)
        tokens = tokens + position.astype(tokens.dtype)
        pool = PoolAttention(self.heads, self.dtype, normal, torch_bias(width), name="attn")
        return pool(tokens[:, :1], tokens)[:, 0]


class ResNet(Tower):
    """CLIP's modified ResNet ("RN50", "RN101", "RN50x4", ...) or a plain one ("resnet18" to
    "resnet152"). Sources: clip/model.py, ModifiedResNet; torchvision.

    The modified ResNet has a stem of three convolutions, strides by average pooling, and ends in
    attention pooling, whose output projection is the tower's and has a bias. The plain ResNet ends
    in mean pooling. With `deep_stem` it has a stem of three convolutions, and shortcuts stride by
    average pooling (He et al. 2018, arXiv:1812.01187, ResNet-D; timm's `resnet50d`). `blocks` (per
    stage) and `width` (of the stem) override the variant's.

    Images must be normalised. `tokens` of the result are the last feature map. Linen's
    intermediates and perturbations also hold it, as `last_map`. In training, BatchNorm's statistics
    are those of the given rows, and the collection `batch_stats` must be mutable.
    """

    variant: str = "RN50"
    image_size: Pixels = 224  # pixels
    width: Width | None = None
    blocks: tuple[Depth, ...] | None = None
    zero_gamma: bool = False  # plain blocks start as the identity; modified blocks always do
    deep_stem: bool = False  # of a plain variant
    norm_eps: Epsilon = 1e-5

    @nn.nowrap
    def check(self) -> None:
        super().check()
        check_name(self.at("variant"), self.variant, [*MODIFIED, *PLAIN])
        blocks, width = self.shape
        stride = 2 ** (len(blocks) + 1)
        check(
            not self.modified or self.image_size % stride == 0,
            self.at("image_size"),
            f"{self.image_size} pixels",
            f"a multiple of {stride}",
            f"set image_size={max(round(self.image_size / stride), 1) * stride}",
        )
        check(
            not (self.modified and self.deep_stem),
            self.at("deep_stem"),
            f"{self.deep_stem} with {self.variant}",
            f"one of {', '.join(PLAIN)}: OpenAI's have a deep stem of their own",
        )
        check(
            0 < len(blocks) <= 8,
            self.at("blocks"),
            blocks,
            "from one to eight stages",
        )
        channels = width * 2 ** (len(blocks) + 1)
        check(
            width % 2 == 0 and (not self.modified or channels % self.heads == 0),
            self.at("width"),
            width,
            "an even number such that heads of about 64 channels divide the last feature map",
        )

    @property
    def modified(self) -> bool:
        return self.variant in MODIFIED

    @property
    def shape(self) -> tuple[tuple[int, ...], int]:
        """Blocks per stage and stem width: the variant's, unless a field overrides it."""
        blocks, width = MODIFIED[self.variant] if self.modified else (PLAIN[self.variant][0], 64)
        return (
            blocks if self.blocks is None else self.blocks,
            width if self.width is None else self.width,
        )

    @property
    def heads(self) -> int:
        """The number of heads of the attention pool, 64 channels each (clip/model.py, CLIP)."""
        blocks, width = self.shape
        return max(width * 2 ** (len(blocks) + 1) // 64, 1)

    @property
    def backbone_width(self) -> int:
        """Channels of the last feature map."""
        blocks, width = self.shape
        bottleneck = self.modified or PLAIN[self.variant][1]
        return width * 2 ** (len(blocks) - 1) * (4 if bottleneck else 1)

    @property
    def biased_projection(self) -> bool:
        """CLIP's attention pool ends in a linear layer with a bias."""
        return self.modified or self.projection_bias

    @property
    def position_table(self) -> PositionTable | None:
        """The positions of the attention pool; None for a plain ResNet.

        One row for the mean token, then one per pixel of the last feature map.
        """
        if not self.modified:
            return None
        side = self.image_size // 2 ** (len(self.shape[0]) + 1)
        return PositionTable(("pool", "positional_embedding"), 1, (side, side))

    @property
    def unseen_settings(self) -> dict[str, Any]:
        return {"heads": self.heads, "norm_eps": self.norm_eps}

    @nn.compact
    def features(
        self,
        x: Float[Array, "b h w 3"],
        *,
        train: bool = False,
        keys: Key[Array, " b"] | None = None,
    ) -> tuple[Float[Array, "b c"], Float[Array, "b n c"]]:
        blocks, width = self.shape
        modified = self.modified
        self.check_images(x, self.image_size)
        train = train and not self.frozen_statistics
        conv, norm = _conv_and_norm(modified, self.norm_eps, self.dtype, train)
        x = x.astype(self.dtype)
        if modified or self.deep_stem:
            x = nn.relu(norm("bn1")(conv("conv1", width // 2, 3, 2)(x)))
            x = nn.relu(norm("bn2")(conv("conv2", width // 2, 3)(x)))
            x = nn.relu(norm("bn3")(conv("conv3", width, 3)(x)))
        else:
            x = nn.relu(norm("bn1")(conv("conv1", width, 7, 2)(x)))
        if modified:
            x = _average(x, 2)
        else:  # padded beforehand, which XLA makes one: converters to ONNX miss a pool's padding
            x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-jnp.inf)
            x = nn.max_pool(x, window_shape=(3, 3), strides=(2, 2))
        for stage, count in enumerate(blocks):
            for i in range(count):
                x = Residual(
                    width * 2**stage,
                    stride=2 if stage and not i else 1,
                    bottleneck=modified or PLAIN[self.variant][1],
                    modified=modified,
                    zero_gamma=modified or self.zero_gamma,
                    norm_eps=self.norm_eps,
                    pooled_shortcut=self.deep_stem,
                    dtype=self.dtype,
                    name=f"stage_{stage}_{i}",
                )(x, train=train)
        # Heat maps read the last map here, and perturb it to get its gradient.
        self.sow(
            "intermediates",
            "last_map",
            x,
            reduce_fn=lambda _, last: last,  # pyright: ignore[reportArgumentType]
        )
        if not self.is_initializing():  # or the variables would keep an array of the batch's size
            x = self.perturb("last_map", x)
        tokens = x.reshape(x.shape[0], -1, x.shape[-1])
        if modified:
            pooled = AttentionPool(self.heads, self.dtype, name="pool")(tokens)
        else:
            pooled = mean_tokens(tokens)
        return pooled, tokens
