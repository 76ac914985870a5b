"""EfficientNet: B0 to B3 and Lite0 to Lite4."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Float, Key

from clipx.config.ranges import Epsilon, Pixels, Ratio
from clipx.models import cpu
from clipx.models.base import Tower
from clipx.models.depthwise import depthwise
from clipx.models.layers import BatchNorm, check, check_name, mean_tokens
from clipx.types import Array, constrain_rows


class Stage(NamedTuple):
    """Blocks of one resolution: the first one has the stride."""

    blocks: int
    kernel: int
    stride: int
    expansion: int
    width: int


# Tan & Le 2019 (arXiv:1905.11946), table 1, and the TensorFlow TPU repository's
# efficientnet_builder.py, which has the kernel sizes
STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)
# The same file and lite/efficientnet_lite_builder.py: factor of the widths, factor of the depths,
# pixels of the images that the published weights were trained with
VARIANTS = {
    "efficientnet_b0": (1.0, 1.0, 224),
    "efficientnet_b1": (1.0, 1.1, 240),
    "efficientnet_b2": (1.1, 1.2, 260),
    "efficientnet_b3": (1.2, 1.4, 300),
    "efficientnet_lite0": (1.0, 1.0, 224),
    "efficientnet_lite1": (1.0, 1.1, 240),
    "efficientnet_lite2": (1.1, 1.2, 260),
    "efficientnet_lite3": (1.2, 1.4, 280),
    "efficientnet_lite4": (1.4, 1.8, 300),
}
STEM, LAST = 32, 1280  # channels of the first and of the last convolution, before `width`


def round_width(width: float) -> int:
    """The nearest multiple of 8 that is not below 90 % of `width` (round_filters of the same)."""
    rounded = max(8, int(width + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * width else rounded


def _fan_out(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    """N(0, 2 / fan_out) of a kernel [h, w, in, out] (conv_kernel_initializer of the same)."""
    return jax.random.normal(key, shape, dtype) * math.sqrt(2 / (shape[0] * shape[1] * shape[3]))


def _depthwise_init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    """`_fan_out` for a kernel with one output per channel."""
    return jax.random.normal(key, shape, dtype) * math.sqrt(2 / (shape[0] * shape[1]))


class Depthwise(nn.Module):
    """A convolution of each channel by itself, without bias. `kernel` is [k, k, 1, c]."""

    size: int
    stride: int
    same: bool
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b i j c"]:
        shape = (self.size, self.size, 1, x.shape[-1])
        kernel = self.param("kernel", _depthwise_init, shape, jnp.float32)
        padding = pad(x.shape[1], self.size, self.stride, self.same)
        return depthwise(x.astype(self.dtype), kernel.astype(self.dtype), self.stride, padding)


def pad(pixels: int, size: int, stride: int, same: bool) -> tuple[int, int]:
    """Zeros before and after one side of an image. Symmetric, as torch pads, or TensorFlow's SAME:
    as few as ceil(pixels / stride) outputs need, and the odd one behind."""
    if not same:
        return (size // 2, size // 2)
    zeros = max((math.ceil(pixels / stride) - 1) * stride + size - pixels, 0)
    return (zeros // 2, zeros - zeros // 2)


class Block(nn.Module):
    """An inverted residual (MBConv): a 1x1 convolution that widens, a depthwise one, squeeze and
    excitation, and a 1x1 convolution that narrows."""

    stage: Stage  # its width is that of this block's output
    stride: int
    lite: bool
    same: bool
    norm_eps: float
    norm_momentum: float
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b i j k"]:
        conv, norm, activate = _parts(self, train)
        before, width = x, x.shape[-1]
        if self.stage.expansion != 1:
            x = conv("conv_expand", width * self.stage.expansion)(x)
            x = activate(norm("bn_expand")(x))
        kernel = Depthwise(self.stage.kernel, self.stride, self.same, self.dtype, name="conv_dw")
        x = activate(norm("bn_dw")(kernel(x)))
        if not self.lite:
            squeezed = mean_tokens(x.reshape(x.shape[0], -1, x.shape[-1]))
            dense = functools.partial(nn.Dense, dtype=self.dtype)
            y = activate(dense(round(width / 4), name="squeeze")(squeezed))
            gate = jax.nn.sigmoid(dense(x.shape[-1], name="excite")(y))
            x = x * gate[:, None, None, :]
        x = norm("bn_project")(conv("conv_project", self.stage.width)(x))
        if self.stride == 1 and width == self.stage.width:
            x = x + before
        return cpu.hold(constrain_rows(x))


def _parts(module: Any, train: bool) -> tuple[Callable, Callable, Callable]:
    """Functions that make a convolution without bias and a BatchNorm, and the activation."""

    def conv(name: str, width: int, size: int = 1, stride: int = 1, pixels: int = 1) -> nn.Conv:
        return nn.Conv(
            width,
            (size, size),
            strides=stride,
            padding=[pad(pixels, size, stride, module.same)] * 2,
            use_bias=False,
            dtype=module.dtype,
            kernel_init=_fan_out,
            conv_general_dilated=cpu.convolution,
            name=name,
        )

    def norm(name: str) -> Callable:
        layer = BatchNorm(module.dtype, module.norm_eps, module.norm_momentum, name=name)
        return functools.partial(layer, train=train)

    return conv, norm, jax.nn.relu6 if module.lite else jax.nn.silu


class EfficientNet(Tower):
    """EfficientNet ("efficientnet_b0" to "efficientnet_b3") or EfficientNet-Lite
    ("efficientnet_lite0" to "efficientnet_lite4"), under timm's names.

    `width` and `depth` override the variant's factors of channels and of blocks per stage. Lite has
    ReLU6 in place of swish, no squeeze and excitation, and a first and a last layer of one size.
    `padding="same"` is TensorFlow's, which the published weights were trained with and timm's
    `tf_efficientnet_*` have, with `norm_eps=1e-3`; "symmetric" is torch's.

    Images must be normalised. `backbone` is the mean of the last feature map, `tokens` are that
    map, and Linen's intermediates and perturbations also hold it, as `last_map`. In training,
    BatchNorm's statistics are those of the given rows, and the collection `batch_stats` must be
    mutable.
    """

    variant: str = "efficientnet_b0"
    image_size: Pixels = 224  # pixels
    width: Ratio | None = None
    depth: Ratio | None = None
    padding: Literal["same", "symmetric"] = "symmetric"
    norm_eps: Epsilon = 1e-5
    norm_momentum: Ratio = 0.1  # weight of new statistics in BatchNorm's running ones

    @nn.nowrap
    def check(self) -> None:
        super().check()
        check_name(self.at("variant"), self.variant, VARIANTS)
        momentum = self.norm_momentum
        check(momentum <= 1, self.at("norm_momentum"), momentum, "a number of at most 1")

    @property
    def lite(self) -> bool:
        return "lite" in self.variant

    @property
    def same(self) -> bool:
        return self.padding == "same"

    @property
    def shape(self) -> tuple[int, tuple[Stage, ...], int]:
        """Channels of the first convolution, the stages, and channels of the last convolution."""
        width, depth, _ = VARIANTS[self.variant]
        width = width if self.width is None else self.width
        depth = depth if self.depth is None else self.depth

        def scaled(index: int, stage: Stage) -> Stage:
            ends = self.lite and index in (0, len(STAGES) - 1)
            blocks = stage.blocks if ends else math.ceil(stage.blocks * depth)
            return stage._replace(blocks=blocks, width=round_width(stage.width * width))

        stages = tuple(scaled(i, stage) for i, stage in enumerate(STAGES))
        ends = (STEM, LAST) if self.lite else (round_width(STEM * width), round_width(LAST * width))
        return ends[0], stages, ends[1]

    @property
    def backbone_width(self) -> int:
        """Channels of the last feature map."""
        return self.shape[2]

    @property
    def unseen_settings(self) -> dict[str, Any]:
        return {"padding": self.padding, "norm_eps": self.norm_eps}

    @nn.compact
    def features(
        self,
        x: Float[Array, "b h w 3"],
        *,
        train: bool = False,
        keys: Key[Array, " b"] | None = None,
    ) -> tuple[Float[Array, "b c"], Float[Array, "b n c"]]:
        stem, stages, last = self.shape
        self.check_images(x, self.image_size)
        train = train and not self.frozen_statistics
        conv, norm, activate = _parts(self, train)
        x = conv("conv1", stem, 3, 2, self.image_size)(x.astype(self.dtype))
        x = activate(norm("bn1")(x))
        for i, stage in enumerate(stages):
            for j in range(stage.blocks):
                x = Block(
                    stage,
                    stride=1 if j else stage.stride,
                    lite=self.lite,
                    same=self.same,
                    norm_eps=self.norm_eps,
                    norm_momentum=self.norm_momentum,
                    dtype=self.dtype,
                    name=f"stage_{i}_{j}",
                )(x, train=train)
        x = activate(norm("bn_last")(conv("conv_last", last)(x)))
        self.sow(
            "intermediates",
            "last_map",
            x,
            reduce_fn=lambda _, last: last,  # pyright: ignore[reportArgumentType]
        )
        if not self.is_initializing():  # or the variables would keep an array of the batch's size
            x = self.perturb("last_map", x)
        tokens = x.reshape(x.shape[0], -1, x.shape[-1])
        return mean_tokens(tokens), tokens
