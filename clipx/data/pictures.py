"""Encoded pictures to pixels: crops to train on, the evaluation transform, both on the host.

OpenCV decodes where it can, at a half, a quarter or an eighth of a JPEG's size when the crop stays
large enough, and Pillow does where it cannot. Orientation tags are not applied, in training nor in
evaluation: so do torchvision and open_clip.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import io
import math
import os
import pathlib
from collections.abc import Iterator, Sequence

import cv2
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from clipx.data.base import Example
from clipx.errors import BadSample, DataError

cv2.setNumThreads(0)  # the parallelism is over pictures

TRIES = 10  # boxes that a crop may try
_RATIO = (3 / 4, 4 / 3)  # width over height of a crop
_MOST_PIXELS = 1 << 26  # of a picture: 200 MB once decoded
_READ = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
_READ_REDUCED = {
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8,
}  # grey is the flag without a colour bit; `_READ` adds colour


def views(
    example: Example,
    crops: Sequence[tuple[float, float]],
    draws: Float[np.ndarray, "v 10 4"],
    flips: Sequence[bool],
    out: UInt8[np.ndarray, "v side side 3"],
) -> None:
    """Writes one crop for each area range of `crops` to `out`, mirrored where `flips` says so. The
    picture is decoded once. `draws` are uniform in [0, 1)."""
    width, height, kind = header(example)
    side = out.shape[1]
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
    """(x, y, w, h) of a random crop, in pixels, from uniform draws in [0, 1): an area from `scale`,
    a ratio from 3/4 to 4/3, log-uniform; where none of ten fits, the whole picture as far as that
    ratio allows. As torchvision's `RandomResizedCrop.get_params`."""
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
    """`crop` at side x side, antialiased: the mean of the covered pixels where it shrinks, bicubic
    where it grows."""
    shrinks = crop.shape[0] >= side and crop.shape[1] >= side
    how = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
    return cv2.resize(crop, (side, side), interpolation=how)


def header(example: Example) -> tuple[int, int, str]:
    """Width, height and format; nothing is decoded yet. A picture of more than 67 megapixels is a
    `BadSample`: whole, it would take hundreds of megabytes in every thread."""
    if isinstance(example.image, np.ndarray):
        return example.image.shape[1], example.image.shape[0], ""
    with _unreadable(example):
        head = Image.open(io.BytesIO(example.image))
        width, height = head.size
        if width * height > _MOST_PIXELS:
            raise ValueError(
                f"{width} x {height} pixels, expected at most {_MOST_PIXELS:,} in all; shrink it"
            )
        return width, height, head.format or ""


def decode(example: Example, reduce: int = 1) -> UInt8[np.ndarray, "h w 3"]:
    """Pixels, 1/reduce as wide and as high: by OpenCV, else by Pillow, which knows more formats."""
    if isinstance(example.image, np.ndarray):
        return example.image
    data = np.frombuffer(example.image, np.uint8)
    with contextlib.suppress(cv2.error):
        pixels = cv2.imdecode(data, _READ | _READ_REDUCED.get(reduce, 0))
        if pixels is not None:
            return pixels
    with _unreadable(example):
        return np.asarray(_rgb(Image.open(io.BytesIO(example.image))))


def evaluation(example: Example, side: int) -> UInt8[np.ndarray, "side side 3"]:
    """The picture resized so that its shorter side is `side` (Pillow, bicubic) and cut to the
    centre: open_clip's evaluation transform."""
    if isinstance(example.image, np.ndarray):
        picture = Image.fromarray(example.image)
    else:
        header(example)
        with _unreadable(example):
            picture = _rgb(Image.open(io.BytesIO(example.image)))
    width, height = picture.size
    if min(width, height) != side:
        if width <= height:
            width, height = side, int(side * height / width)
        else:
            width, height = int(side * width / height), side
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - side) / 2), round((height - side) / 2)
    return np.asarray(picture.crop((left, top, left + side, top + side)))


class Pictures:
    """Images as an evaluator sees them: files, Pillow images or uint8 arrays, without a source."""

    def __init__(self, image_size: int):
        self.image_size = image_size

    def __call__(
        self, images: Sequence[Image.Image | np.ndarray | str | os.PathLike], size: int
    ) -> Iterator[UInt8[np.ndarray, "n h w 3"]]:
        """uint8 images in the order given, `size` at a time but for the last batch, each through
        the evaluation transform. An array is one uint8 image, [h, w] or [h, w, 1|3|4]. Raises
        `DataError` for a file that is missing or holds no image, and for other arrays."""
        with concurrent.futures.ThreadPoolExecutor(min(cores(), 16)) as pool:
            for start in range(0, len(images), size):
                yield np.stack(list(pool.map(self._one, images[start : start + size])))

    def sizes(self, paths: Sequence[str | os.PathLike]) -> list[tuple[int, int]]:
        """Width and height of each file, as it is on disk."""
        return [self._checked(path, header)[:2] for path in paths]

    def _one(
        self, image: Image.Image | np.ndarray | str | os.PathLike
    ) -> UInt8[np.ndarray, "h w 3"]:
        if isinstance(image, np.ndarray):
            image = _from_array(image)
        if isinstance(image, Image.Image):
            pixels = np.asarray(_rgb(image))
            return evaluation(Example(pixels, (), 0, "image"), self.image_size)
        return self._checked(image, lambda example: evaluation(example, self.image_size))

    def _checked(self, path, function):
        try:
            data = pathlib.Path(path).read_bytes()
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
    """`picture` in mode RGB; of 16-bit greys the upper eight, where Pillow would cut at 255."""
    if picture.mode.startswith("I"):
        picture = Image.fromarray((np.asarray(picture).astype(np.uint32) >> 8).astype(np.uint8))
    return picture.convert("RGB")


@contextlib.contextmanager
def _unreadable(example: Example):
    """Whatever a decoder raises becomes a `BadSample`: they raise all sorts of things."""
    try:
        yield
    except Exception as error:
        size = len(example.image)
        reason = f"the picture ({size} bytes) cannot be decoded: {error}"
        raise BadSample(example.key, reason.replace("\n", " ")) from None


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
