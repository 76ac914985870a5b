"""Decodes pictures on the host: random crops for training, and the evaluation transform.

OpenCV decodes JPEG, PNG and WebP, and Pillow decodes what OpenCV cannot. JPEGs are decoded at 1/2,
1/4 or 1/8 of their size if every crop stays large enough. Orientation tags are ignored in training
and in evaluation, as in torchvision and open_clip.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import cv2
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from clipx.config import regular
from clipx.data import raster
from clipx.data.base import Example
from clipx.data.framing import CENTRE, Framing
from clipx.data.limits import USUAL, Limits
from clipx.errors import BadSample, DataError

cv2.setNumThreads(0)  # pictures are decoded in parallel, one thread each

_Result = TypeVar("_Result")

TRIES = 10  # random boxes per crop before the fallback to a centre crop
_RATIO = (3 / 4, 4 / 3)  # range of a crop's width / height
# OpenCV decodes these as Pillow does. Other formats may get other colours: transparent GIF, and Lab
# or floats in TIFF.
_OPENCV = ("JPEG", "PNG", "WEBP")
_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_LITTLE = 1.8  # factor from which averaging areas is nearer to Pillow's bicubic
# standard deviation in pixels of the blur before it, as a share of the factor
_BLUR = 0.37
_READ = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
_READ_REDUCED = {
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8,
}  # the GRAYSCALE flags only reduce; `_READ` adds the colour bit


def views(
    example: Example,
    crops: Sequence[tuple[float, float] | None],
    draws: Float[np.ndarray, "v 10 4"],
    flips: Sequence[bool],
    out: UInt8[np.ndarray, "v side side 3"],
    limits: Limits = USUAL,
    framing: Framing = CENTRE,
) -> None:
    """Decodes the picture and writes v crops to `out`.

    crops: the range of areas of each random crop, as shares of the picture; None for the centre
      crop of `evaluation`, which has its own decoder.
    draws: uniform numbers in [0, 1), for `TRIES` boxes per crop.
    flips: whether to mirror each crop.
    """
    if None in crops:
        middle = evaluation(example, out.shape[1], limits, framing)
        for scale, flip, view in zip(crops, flips, out):
            if scale is None:
                view[...] = middle[:, ::-1] if flip else middle
    drawn = [each for each in zip(crops, draws, flips, out) if each[0] is not None]
    if drawn:
        _random_views(example, limits, *zip(*drawn))


def _random_views(
    example: Example,
    limits: Limits,
    crops: Sequence[tuple[float, float]],
    draws: Sequence[Float[np.ndarray, "10 4"]],
    flips: Sequence[bool],
    out: Sequence[UInt8[np.ndarray, "side side 3"]],
) -> None:
    """The random crops of `views`, from one decoding of the picture."""
    width, height, kind = header(example, limits)
    side = len(out[0])
    boxes = [crop_box(width, height, s, d) for s, d in zip(crops, draws)]
    smallest = min(min(w, h) for _, _, w, h in boxes)
    fitting = [k for k in _READ_REDUCED if kind == "JPEG" and smallest >= k * side]
    picture = decode(example, max(fitting, default=1))
    scale_x, scale_y = picture.shape[1] / width, picture.shape[0] / height
    for view, (x, y, w, h), flip in zip(out, boxes, flips):
        left, top = round(x * scale_x), round(y * scale_y)
        right = max(left + 1, round((x + w) * scale_x))
        bottom = max(top + 1, round((y + h) * scale_y))
        crop = resize(picture[top:bottom, left:right], side)
        if flip:
            cv2.flip(crop, 1, view)
        else:
            view[...] = crop


def crop_box(
    width: int, height: int, scale: tuple[float, float], draws: Float[np.ndarray, "10 4"]
) -> tuple[int, int, int, int]:
    """(x, y, w, h) of a random crop, in pixels, as torchvision's `RandomResizedCrop.get_params`.

    The area is a uniform share in `scale`, and the ratio log-uniform from 3/4 to 4/3. If none of
    the ten boxes fits, it is the largest centre crop with a ratio in that range. `draws` are
    uniform in [0, 1).
    """
    low, high = (math.log(r) for r in _RATIO)
    for area, ratio, across, down in draws.tolist():
        area = width * height * (scale[0] + (scale[1] - scale[0]) * area)
        ratio = math.exp(low + (high - low) * ratio)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(across * (width - w + 1)), int(down * (height - h + 1)), w, h
    w = min(width, round(height * _RATIO[1]))
    h = min(height, round(width / _RATIO[0]))
    return (width - w) // 2, (height - h) // 2, w, h


def resize(crop: UInt8[np.ndarray, "h w 3"], side: int) -> UInt8[np.ndarray, "side side 3"]:
    """`crop` resized to side x side.

    Where it shrinks a little: bicubic, after a small blur. That is nearer to the bicubic of Pillow
    and torchvision than averaging areas is, by 1 to 9 dB on photographs, and takes half the time.
    Where it shrinks more: by averaging areas. Else bicubic.
    """
    down, across = crop.shape[0] / side, crop.shape[1] / side
    interpolation = cv2.INTER_CUBIC
    if min(down, across) >= 1 and max(down, across) >= _LITTLE:
        interpolation = cv2.INTER_AREA
    elif min(down, across) >= 1 and max(down, across) > 1:
        crop = cv2.GaussianBlur(crop, (3, 3), _BLUR * across, sigmaY=_BLUR * down)
    return cv2.resize(crop, (side, side), interpolation=interpolation)


def header(example: Example, limits: Limits = USUAL) -> tuple[int, int, str]:
    """Returns (width, height, format) without decoding the pixels; format is "" for an array.

    Raises `BadSample` for more pixels than `limits` allow.
    """
    if isinstance(example.image, np.ndarray):
        return example.image.shape[1], example.image.shape[0], ""
    with _unreadable(example):
        try:
            head = raster.opened(example.image)
        except Image.DecompressionBombError as error:
            raise ValueError(f"{error} (config.data.limits.pixels)") from None
        width, height = head.size
        limits.check_pixels(width, height)
        return width, height, head.format or ""


def decode(example: Example, reduce: int = 1) -> UInt8[np.ndarray, "h w 3"]:
    """RGB pixels: of JPEG, PNG and WebP from OpenCV at 1/reduce of the width and height, of other
    formats at full size from Pillow, as evaluation reads them."""
    if isinstance(example.image, np.ndarray):
        return example.image
    with _unreadable(example):
        if raster.kind(example.image) in _OPENCV:
            data = np.frombuffer(example.image, np.uint8)
            with contextlib.suppress(cv2.error):
                pixels = cv2.imdecode(data, _READ | _READ_REDUCED.get(reduce, 0))
                if pixels is not None:
                    return pixels
        return np.asarray(_rgb(raster.opened(example.image)))


def evaluation(
    example: Example, side: int, limits: Limits = USUAL, framing: Framing = CENTRE
) -> UInt8[np.ndarray, "side side 3"]:
    """open_clip's evaluation transform, by Pillow: by default the shorter side resized to `side`,
    bicubic, then a centre crop."""
    if isinstance(example.image, np.ndarray):
        picture = Image.fromarray(example.image)
    else:
        header(example, limits)
        with _unreadable(example):
            picture = _rgb(raster.opened(example.image))
    width, height, left, top = framing.box(*picture.size, side)
    if (width, height) != picture.size:
        picture = picture.resize((width, height), _FILTERS[framing.interpolation])
    return np.asarray(picture.crop((left, top, left + side, top + side)))


class Pictures:
    """Reads images as evaluators see them, without a source: files, Pillow images, uint8 arrays."""

    def __init__(self, image_size: int, framing: Framing = CENTRE):
        self.image_size, self.framing = image_size, framing

    def __call__(
        self, images: Sequence[Image.Image | np.ndarray | str | os.PathLike], size: int
    ) -> Iterator[UInt8[np.ndarray, "n h w 3"]]:
        """Yields uint8 images through the evaluation transform, in the order of `images`, `size`
        per batch; the last batch may be smaller. An array is one uint8 image, [h, w] or
        [h, w, 1|3|4].

        Raises `DataError` for a file that is missing or not an image, and for any other array.
        """
        with concurrent.futures.ThreadPoolExecutor(threads()) as pool:
            for start in range(0, len(images), size):
                yield np.stack(list(pool.map(self._one, images[start : start + size])))

    def sizes(self, paths: Sequence[str | os.PathLike]) -> list[tuple[int, int]]:
        """The (width, height) of each file before the transform."""
        return [self._checked(path, header)[:2] for path in paths]

    def frame(self, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """Of a picture of `size` (width, height): (width and height to which it is resized, left
        and top of the square that is cut out of it)."""
        return self.framing.box(*size, self.image_size)

    def _one(
        self, image: Image.Image | np.ndarray | str | os.PathLike
    ) -> UInt8[np.ndarray, "h w 3"]:
        if isinstance(image, np.ndarray):
            image = _from_array(image)
        if isinstance(image, Image.Image):
            pixels = np.asarray(_rgb(image))
            return self._framed(Example(pixels, (), 0, "image"))
        return self._checked(image, self._framed)

    def _framed(self, example: Example) -> UInt8[np.ndarray, "h w 3"]:
        return evaluation(example, self.image_size, framing=self.framing)

    def _checked(self, path: str | os.PathLike, function: Callable[[Example], _Result]) -> _Result:
        try:
            with open(path, "rb", opener=regular.only) as file:
                data = file.read()
            return function(Example(data, (), 0, str(path)))
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from None
        except BadSample as error:
            raise DataError(str(error)) from None


def _from_array(pixels: np.ndarray) -> Image.Image:
    """A Pillow image of a uint8 array [h, w] or [h, w, 1|3|4]; `DataError` for any other."""
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or channels not in (1, 3, 4):
        raise DataError(
            f"an image array of {pixels.dtype} {list(pixels.shape)}, expected uint8 [h, w, 3] "
            "with values from 0 to 255"
        )
    return Image.fromarray(pixels[..., 0] if pixels.ndim == 3 and channels == 1 else pixels)


def _rgb(picture: Image.Image) -> Image.Image:
    """`picture` in mode RGB. 16-bit grey keeps its upper 8 bits, and floats from 0 to 1 are scaled,
    where Pillow would clip at 255 and at 0. Raises `ValueError` for other ranges of numbers."""
    if picture.mode == "F" or (picture.mode == "I" and picture.format == "TIFF"):
        picture = Image.fromarray(_to_bytes(np.asarray(picture)))
    elif picture.mode.startswith("I"):
        picture = Image.fromarray((np.asarray(picture).astype(np.uint32) >> 8).astype(np.uint8))
    return picture.convert("RGB")


def _to_bytes(grey: np.ndarray) -> UInt8[np.ndarray, "h w"]:
    """Grey values of 32 bits as bytes. Their range tells what is white: 1 for floats, 255, or
    65,535 for whole numbers."""
    least, most = (float(value) for value in (grey.min(), grey.max()))
    whole = np.issubdtype(grey.dtype, np.integer)
    whites = (255, 65_535) if whole else (1, 255)
    white = next((white for white in whites if 0 <= least <= most <= white), None)
    if white is None:
        expected = " or 0 to ".join(map(str, whites))
        raise ValueError(f"grey values from {least:g} to {most:g}, expected 0 to {expected}")
    return (grey >> 8 if white == 65_535 else np.rint(grey * (255 / white))).astype(np.uint8)


@contextlib.contextmanager
def _unreadable(example: Example) -> Iterator[None]:
    """Turns every exception into a `BadSample`: decoders raise many kinds."""
    try:
        yield
    except Exception as error:
        size = len(example.image)
        reason = f"the picture ({size} bytes) cannot be decoded: {error}"
        raise BadSample(example.key, reason.replace("\n", " ")) from None


def raw(example: Example) -> bytes:
    """The bytes of the picture: those of its file, or the pixels of an array."""
    image = example.image
    return image if isinstance(image, bytes) else np.ascontiguousarray(image).tobytes()


def digest(data: bytes) -> int:
    """A hash of 64 bits."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def threads() -> int:
    """How many threads decode pictures."""
    return min(cores(), 16)


def cores() -> int:
    """The number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
