"""Colour augmentation on the device, with one PRNG key per row, and normalisation for the towers.

Every operation is Pillow's of the same name, including its rounding to integer levels. It runs on
all rows at once, with one parameter per row. Pictures are uint8 between operations. Inside an
operation the arithmetic is float32 on integers and short binary fractions, so its results are
exact. So no order of summation and no fused multiply-add can change a level: a row has the same
bits on any mesh.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import TYPE_CHECKING, Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, UInt8

from clipx.config.ranges import Crop, Fraction, Ordered, Range
from clipx.errors import ConfigError

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)  # openai/CLIP, clip/clip.py
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)  # torchvision's models
IMAGENET_STD = (0.229, 0.224, 0.225)

_GRID = 2**14  # sampled factors are multiples of 1/_GRID; times a level they are exact in float32
_WEIGHT = 2**16  # a blur's weights are multiples of 1/_WEIGHT, for the same reason
_OFF = 256  # a solarising threshold that no level reaches

Strength = Annotated[float, Range(0, 10)]
Sigma = Annotated[float, Range(0, 100)]


@dataclasses.dataclass(frozen=True)
class Policy:
    """The augmentation of one picture view: first on the host (crop, flip), then on the device.

    Operations run in the order of the fields. A strength or probability of 0 turns one off.
    """

    # least and most share of the area that a crop covers; None: the evaluation's centre crop
    scale: Crop | None = (0.9, 1.0)
    flip: bool = False  # mirror left to right with probability 1/2
    mirror_words: bool = False  # swap "left" and "right" in the captions of a mirrored picture
    jitter: Fraction = 0.0  # probability of the next four operations, which run in a random order
    brightness: Strength = 0.0  # s: a factor from U(max(0, 1 - s), 1 + s)
    contrast: Strength = 0.0  # likewise
    saturation: Strength = 0.0  # likewise
    hue: Annotated[float, Range(0, 0.5)] = 0.0  # s: a shift from U(-s, s) of the colour circle
    grey: Fraction = 0.0  # probability
    blur: Fraction = 0.0  # probability
    blur_sigma: Annotated[tuple[Sigma, Sigma], Ordered()] = (0.1, 2.0)  # pixels
    # None: Pillow's GaussianBlur; odd: torchvision's of this width
    blur_kernel: Annotated[int, Range(1, 255)] | None = None
    solarise: Fraction = 0.0  # probability; levels from 128 on are inverted

    def __post_init__(self):
        if self.blur_kernel is not None and self.blur_kernel % 2 == 0:
            raise ConfigError("Policy.blur_kernel", str(self.blur_kernel), "an odd number, or None")

    @property
    def on_device(self) -> bool:
        """Whether an operation runs on the device."""
        return any((self.jitter, self.grey, self.blur, self.solarise))


# SimCLR's distortions as in MoCo v2, without the crop.
_MOCOV2 = Policy(
    flip=True,
    jitter=0.8,
    brightness=0.4,
    contrast=0.4,
    saturation=0.4,
    hue=0.1,
    grey=0.2,
    blur=0.5,
    blur_sigma=(0.1, 2.0),
)
# CLIP-Lite, factories.py:120-147: no greyscale, no blur. CLIP-Lite rounds as OpenCV does.
_CLIP_LITE = Policy(
    scale=(0.2, 1.0), jitter=0.8, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1
)

POLICIES: dict[str, Policy] = {
    "none": Policy(),  # CLIP, arXiv 2103.00020, section 2.4: a crop alone, with open_clip's scale
    "flip": Policy(flip=True),
    "center": Policy(scale=None),  # the view that evaluation sees: nothing is random
    # DeCLIP, imagenet_dataloader.py, MOCOV2 (= SIMCLR = SIMSIAM): both of its views
    "mocov2": dataclasses.replace(_MOCOV2, scale=(0.2, 1.0)),
    # SLIP's two self-supervised views, as in facebookresearch/SLIP. (The DeCLIP repository's `SLIP`
    # takes "mocov2" instead.) The view that meets the caption is "standard_slip".
    "slip": dataclasses.replace(_MOCOV2, scale=(0.08, 1.0)),
    "standard_slip": Policy(scale=(0.5, 1.0)),  # the DeCLIP repository's STANDARD_SLIP
    # ProtoCLIP, open_clip/transform.py:13-52, `protoclip-light-augmentation`
    "protoclip_light": Policy(
        scale=(0.5, 1.0),
        flip=True,
        jitter=0.2,
        brightness=0.8,
        contrast=0.8,
        saturation=0.8,
        hue=0.2,
        grey=0.2,
        blur=0.2,
        blur_sigma=(0.1, 2.0),
        blur_kernel=21,
    ),
    "clip_lite": _CLIP_LITE,
    # CLIP-Lite's bsab_* and visab_* configs: the picture and its caption are mirrored together
    "clip_lite_flip": dataclasses.replace(_CLIP_LITE, flip=True, mirror_words=True),
}

if TYPE_CHECKING:  # a checker cannot read the names of a dict
    Named = str
else:
    Named = Literal[*POLICIES]


def find(policy: Named | Policy) -> Policy:
    """The policy with this name; a `Policy` is returned as it is."""
    return policy if isinstance(policy, Policy) else POLICIES[policy]


_ORDERS = np.array(list(itertools.permutations(range(3))))  # brightness, contrast, saturation


def normalize(
    image: UInt8[Array, "*b h w 3"],
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> Float[Array, "*b h w 3"]:
    """(image / 255 - mean) / std per RGB channel, in float32."""
    means, stds = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)
    return (image.astype(jnp.float32) / 255.0 - means) / stds


def photometry(
    image: UInt8[Array, "b h w 3"], keys: Key[Array, " b"], policy: Policy
) -> UInt8[Array, "b h w 3"]:
    """The pictures after the device's part of `policy`; row i depends on picture i and key i alone.

    Returns `image` itself if the policy has no operation on the device. Each key gives ten uniform
    numbers: coins for jitter, grey, blur and solarise; the order of the jitter and its four
    strengths; the blur's sigma. All ten are sampled, even if the policy does not use them.
    """
    return _photometry(image, keys, policy) if policy.on_device else image


@functools.partial(jax.jit, static_argnames="policy")
def _photometry(image: Array, keys: Array, policy: Policy) -> Array:
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (10,), jnp.float32))(keys)
    coins, order, strengths, sigma = uniform[:, :4], uniform[:, 4], uniform[:, 5:9], uniform[:, 9]
    x = _planes(image)
    grey = (coins[:, 1] >= policy.grey).astype(jnp.float32)  # as a saturation factor: 0 is grey
    if policy.jitter:
        x, kinds, factors = _jitter(x, coins[:, 0] < policy.jitter, order, strengths, policy)
        kinds = jnp.pad(kinds, ((0, 0), (0, 1)), constant_values=2)
        x = _blends(x, kinds, jnp.concatenate([factors, grey[:, None]], 1))
    elif policy.grey:
        x = _blend(x, _grey(x), grey)
    if policy.blur:
        sigma = jnp.where(coins[:, 2] < policy.blur, _between(sigma, *policy.blur_sigma), 0.0)
        x = _blur(x, sigma, policy.blur_sigma[1], policy.blur_kernel)
    if policy.solarise:
        x = _solarise(x, jnp.where(coins[:, 3] < policy.solarise, 128, _OFF))
    return _pictures(x)


def _jitter(
    x: Array, chosen: Array, order: Array, strengths: Array, policy: Policy
) -> tuple[Array, Array, Array]:
    """(the picture so far, kinds [b, 3] and factors [b, 3] of the blends that the caller must do).

    Each row has one of the 24 orders of the four colour operations. Brightness, contrast and
    saturation are blends with another picture, so `_blends` serves all three. Hue costs more and
    runs once, here, after the blends that come before it in the row's order.
    """
    order = jnp.floor(order * 24).astype(jnp.int32)
    kinds = jnp.asarray(_ORDERS, jnp.int32)[order % 6]
    blends = (policy.brightness, policy.contrast, policy.saturation)
    factors = [
        jnp.where(chosen, _between(strengths[:, i], max(0.0, 1.0 - s), 1.0 + s), 1.0)
        for i, s in enumerate(blends)
    ]
    factors = jnp.take_along_axis(jnp.stack(factors, 1), kinds, 1)
    if policy.hue:
        before = jnp.arange(3) < (order // 6)[:, None]  # 0 to 3 blends run before hue
        x = _blends(x, kinds, jnp.where(before, factors, 1.0))
        shift = _between(strengths[:, 3], -policy.hue, policy.hue)
        x = jnp.where(_per_row(chosen), _hue(x, shift), x)
        factors = jnp.where(before, 1.0, factors)
    return x, kinds, factors


def _blends(x: Array, kinds: Array, factors: Array) -> Array:
    """k blends per row: `kinds` [b, k] says brightness (0), contrast (1) or saturation (2).

    They run in a loop, because XLA would otherwise recompute an operation at each use by the next.
    """

    def step(k: Array, x: Array) -> Array:
        grey, kind = _grey(x), _per_row(kinds[:, k])
        pivot = jnp.where(kind == 0, 0.0, jnp.where(kind == 1, _mean(grey), grey))
        return _blend(x, pivot, factors[:, k])

    return jax.lax.fori_loop(0, kinds.shape[1], step, x)


# Below, x is uint8 [b, 3, h, w]: rows of pixels are contiguous, which suits vector units.


def _planes(image: Array) -> Array:
    return jnp.moveaxis(image, -1, 1)


def _pictures(x: Array) -> Array:
    return jnp.moveaxis(x, 1, -1)


def _per_row(value: Array) -> Array:
    """A value per row, as [b, 1, 1, 1]."""
    return jnp.asarray(value)[:, None, None, None]


def _between(u: Array, low: float, high: float) -> Array:
    """`u`, uniform in 0..1, mapped to a multiple of 1/_GRID from `low` to `high`."""
    first, last = math.ceil(low * _GRID), math.floor(high * _GRID)
    return (first + jnp.floor(u * (last - first + 1))) / _GRID


def _blend(x: Array, pivot: Array, factor: Array) -> Array:
    """Pillow's `Image.blend`: pivot + factor (x - pivot), clipped to 0..255, rounded down.

    A factor of 1 changes nothing.
    """
    factor = _per_row(factor).astype(jnp.float32)
    y = pivot + factor * (x.astype(jnp.float32) - pivot)
    return jnp.floor(jnp.clip(y, 0.0, 255.0)).astype(jnp.uint8)


def _grey(x: Array) -> Array:
    """ITU-R 601-2 luma [b, 1, h, w] as integer levels in float32.

    The weights are Pillow's 16-bit ones. Their sums stay below 2^24, so they are exact.
    """
    r, g, b = (x[:, i : i + 1].astype(jnp.float32) for i in range(3))
    return jnp.floor((19595.0 * r + 38470.0 * g + 7471.0 * b + 32768.0) / 65536.0)


def _mean(grey: Array) -> Array:
    """The mean level [b, 1, 1, 1] in float32, rounded as in `ImageEnhance.Contrast`.

    The sum is int32, which suffices for 8 million pixels.
    """
    pixels = grey.shape[2] * grey.shape[3]
    total = jnp.sum(grey.astype(jnp.int32), axis=(2, 3), keepdims=True, dtype=jnp.int32)
    return ((total + pixels // 2) // pixels).astype(jnp.float32)


def _hue(x: Array, shift: Array) -> Array:
    """torchvision's `adjust_hue`: to Pillow's HSV bytes, hue + int(255 shift) modulo 256, and back.

    A shift of 0 still rounds. A hue is n / 6c of the circle, with the chroma c and an integer n.
    Before a quotient is rounded down, its dividend is increased by one half, so that an integer
    quotient stays the same however the division rounds.
    """
    r, g, b = (x[:, i].astype(jnp.float32) for i in range(3))
    value = jnp.maximum(jnp.maximum(r, g), b)
    chroma = value - jnp.minimum(jnp.minimum(r, g), b)
    n = jnp.where(r == value, g - b, jnp.where(g == value, 2 * chroma + b - r, 4 * chroma + r - g))
    n = jnp.where(n < 0, n + 6 * chroma, n)
    angle = jnp.floor((85 * n + 0.5) / jnp.maximum(2 * chroma, 1.0))
    saturation = jnp.floor((255 * chroma + 0.5) / jnp.maximum(value, 1.0))
    shift = jnp.trunc(255 * jnp.asarray(shift, jnp.float32))[:, None, None]
    angle = jnp.where(chroma == 0, 0.0, angle) + shift
    angle = angle - 256 * jnp.floor(angle / 256)

    def channel(turn: int) -> Array:
        """value (1 - s a), s = saturation / 255; a, in 85ths, is 0 near the hue and 1 opposite."""
        a = 2 * angle + 85 * turn
        a = a - 510 * jnp.floor((a + 0.5) / 510)
        a = jnp.clip(jnp.minimum(a, 340 - a), 0, 85)
        return jnp.round(value * (21675 - saturation * a) / 21675)  # 21675 = 85 x 255

    return jnp.stack([channel(5), channel(3), channel(1)], 1).astype(jnp.uint8)


def _solarise(x: Array, threshold: Array) -> Array:
    """Pillow's `ImageOps.solarize`: inverts levels from `threshold` on."""
    return jnp.where(x.astype(jnp.int32) < _per_row(threshold), x, 255 - x)


def _box_radius(sigma: Any, xp: Any = jnp) -> Any:  # arrays of jnp, or a number and np
    """The fractional radius of the box that, passed three times, makes a Gaussian (BoxBlur.c)."""
    variance = sigma * sigma / 3
    radius = xp.floor((xp.sqrt(12 * variance + 1) - 1) / 2)
    part = (2 * radius + 1) * (radius * (radius + 1) - 3 * variance)
    return radius + part / (6 * (variance - (radius + 1) ** 2))


def _blur_weights(sigma: Array, most: float, kernel: int | None) -> Array:
    """Weights [b, k + 1] for the offsets 0 to k of a symmetric window that sums to exactly 1."""
    sigma = jnp.minimum(jnp.asarray(sigma, jnp.float32), most)[:, None]
    if kernel is None:
        reach = int(_box_radius(most, np)) + 1
        offset = jnp.arange(reach + 1, dtype=jnp.float32)
        window = jnp.clip(_box_radius(sigma) - offset + 1, 0, 1)
    else:
        offset = jnp.arange(kernel // 2 + 1, dtype=jnp.float32)
        window = jnp.exp(-0.5 * (offset / jnp.maximum(sigma, 1e-3)) ** 2)
    window = window / (2 * jnp.sum(window, 1, keepdims=True) - window[:, :1])
    sides = jnp.round(window[:, 1:] * _WEIGHT) / _WEIGHT
    return jnp.concatenate([1 - 2 * jnp.sum(sides, 1, keepdims=True), sides], 1)


def _blur(x: Array, sigma: Array, most: float, kernel: int | None) -> Array:
    """Pillow's `ImageFilter.GaussianBlur(sigma)`; with a `kernel`, torchvision's `gaussian_blur` of
    that odd width. A sigma of 0 changes nothing; `most` bounds sigma and fixes the window's width.

    The blur runs along the rows and then down the columns, each in a loop, for the same reason as
    `_blends`. Pillow passes a box three times and repeats the edge: the loop is over the passes.
    torchvision passes a Gaussian once and reflects the edge: the loop is over the channels.
    """
    weights = _blur_weights(sigma, most, kernel)
    reach = weights.shape[1] - 1

    def step(x: Array, axis: int, mode: str) -> Array:
        size = x.shape[axis]
        pad = [(reach, reach) if a == axis else (0, 0) for a in range(4)]
        cut = functools.partial(jax.lax.slice_in_dim, jnp.pad(x, pad, mode=mode), axis=axis)
        total = _per_row(weights[:, 0]) * x.astype(jnp.float32)
        for k in range(1, reach + 1):
            before, after = cut(reach - k, reach - k + size), cut(reach + k, reach + k + size)
            pair = before.astype(jnp.float32) + after.astype(jnp.float32)
            total += _per_row(weights[:, k]) * pair
        return jnp.floor(total + 0.5).astype(jnp.uint8)

    for axis in (3, 2):
        if kernel is None:
            x = jax.lax.fori_loop(0, 3, lambda _, x, axis=axis: step(x, axis, "edge"), x)
        else:
            blur_channel = functools.partial(step, axis=axis, mode="reflect")
            x = jnp.concatenate(jax.lax.map(blur_channel, jnp.stack(jnp.split(x, 3, 1))), 1)
    return x
