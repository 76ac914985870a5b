"""What happens to a picture before a foreign model sees it, read from the model's own config, and
compared with what clipx does."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, Literal

from clipx.errors import ConfigError
from clipx.interop.settings import Section, keys
from clipx.ops import photometry

Resize = Literal["shortest", "squash", "longest"]
Interpolation = Literal["bicubic", "bilinear"]
RESAMPLE: dict[Interpolation, int] = {"bicubic": 3, "bilinear": 2}  # Pillow's numbers
_FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # by Pillow's numbers
# transformers' classes whose steps are those of clipx: resize, centre cut, rescale, normalise
_CLASS = re.compile(r"(CLIP|Siglip)(ImageProcessor(Fast|Pil)?|FeatureExtractor)")
_HARMLESS = keys(
    "processor_class do_convert_rgb data_format input_data_format return_tensors device auto_map "
    "disable_grouping _valid_kwargs_names _processor_class _commit_hash "
    "transformers_version"
)


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """A picture's way into a model.

    differences: what the model's own library does and clipx cannot, as "preprocessing.name: text".
    """

    mean: tuple[float, float, float]  # RGB, of values in 0..1
    std: tuple[float, float, float]
    resize: Resize  # how a picture becomes a square
    interpolation: Interpolation
    differences: tuple[str, ...] = ()

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of a `Model`."""
        names = ("mean", "std", "resize", "interpolation")
        return {name: getattr(self, name) for name in names}


def huggingface(
    values: Mapping[str, Any], image_size: int, siglip: bool, where: str
) -> Preprocessing:
    """What a `preprocessor_config.json` describes. A missing key is the default of its class, a
    missing size that of the image tower.

    image_size: of the image tower. siglip: whether the class is SigLIP's if the file names none.
    Raises `ConfigError` at `where` for values that are no such setting.
    """
    section, differences = Section(values, where, harmless=_HARMLESS), []
    named = section.get("image_processor_type") or section.get("feature_extractor_type")
    section.get("feature_extractor_type")
    if named and not (isinstance(named, str) and _CLASS.fullmatch(named)):
        differences.append(
            f"preprocessing.image_processor_type: {named!r} in the model, CLIP's or SigLIP's in "
            "clipx"
        )
    elif named:
        siglip = named.startswith("Siglip")
    half = (0.5, 0.5, 0.5)
    mean, std = normalisation(section, (half, half) if siglip else _OPENAI)
    resize, difference = _resizing(section, image_size, siglip)
    differences += difference
    interpolation, difference = _interpolation(section)
    differences += difference
    differences += section.unread("preprocessing")
    return Preprocessing(mean, std, resize, interpolation, tuple(differences))


def open_clip(values: Mapping[str, Any], where: str) -> Preprocessing:
    """What a `preprocess_cfg` describes. open_clip ignores `size` there, which is the image
    tower's, and keys of other names. Raises `ConfigError` at `where` for values that open_clip
    refuses."""
    section = Section(values, where, "preprocess_cfg")
    section.one_of("mode", ("RGB",), "RGB")
    section.one_of("interpolation", ("bicubic", "bilinear", "random"), "bicubic")
    # "random" is for training; open_clip evaluates with bicubic
    interpolation = "bilinear" if section.get("interpolation") == "bilinear" else "bicubic"
    resize = section.one_of("resize_mode", ("shortest", "squash", "longest"), "shortest")
    fill = section.get("fill_color", 0)
    differences = (
        (f"preprocessing.fill_color: {fill} in the model, 0 in clipx",)
        if resize == "longest" and fill != 0
        else ()
    )
    mean = _three(section, "mean", photometry.OPENAI_MEAN)
    std = _three(section, "std", photometry.OPENAI_STD)
    return Preprocessing(mean, std, resize, interpolation, differences)


def _three(section: Section, key: str, default: tuple[float, ...]) -> tuple[float, float, float]:
    """Three numbers, or one for all channels. A deviation must be greater than 0."""
    given = section.get(key, list(default))
    values = given if isinstance(given, list | tuple) else [given] * 3
    numbers = [x for x in values if isinstance(x, int | float) and math.isfinite(x)]
    if len(values) != 3 or len(numbers) != 3 or ("std" in key and min(numbers) <= 0):
        least = ", each greater than 0" * ("std" in key)
        raise ConfigError(section.at(key), repr(given), f"three numbers{least}")
    red, green, blue = map(float, numbers)
    return red, green, blue


_OPENAI = (photometry.OPENAI_MEAN, photometry.OPENAI_STD)


def normalisation(
    section: Section, default: tuple[tuple[float, ...], tuple[float, ...]]
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and deviation of values in 0..1: those of the file or `default`, for its own scale of
    values."""
    mean, std = _three(section, "image_mean", default[0]), _three(section, "image_std", default[1])
    if not section.flag("do_normalize", True, null=False):
        mean, std = (0.0,) * 3, (1.0,) * 3
    factor = section.get("rescale_factor") and section.number("rescale_factor") or 1 / 255
    scale = 255 * (factor if section.flag("do_rescale", True, null=False) else 1)
    if not math.isclose(scale, 1, rel_tol=1e-6):
        mean, std = (tuple(x / scale for x in values) for values in (mean, std))
    return mean, std  # pyright: ignore[reportReturnType]  # three values each


def _resizing(section: Section, image_size: int, siglip: bool) -> tuple[Resize, list[str]]:
    """How the file makes a square of a picture, and the difference if clipx makes another one."""
    whole = (image_size, image_size)
    square = section.flag("default_to_square", False, null=False)
    size = _size(section, "size", square, whole if siglip else (image_size,))
    crop = _size(section, "crop_size", True, whole)
    if not section.flag("do_resize", True, null=False):
        size = None
    if not section.flag("do_center_crop", not siglip, null=False):
        crop = None
    cut = "" if crop is None else f", then the centre {crop[-1]} x {crop[0]}"
    if size is None:
        way = f"as large as it is{cut}"
    elif len(size) == 1:
        way = f"the shorter side to {size[0]}{cut}"
    else:
        way = f"to {size[1]} x {size[0]}{cut}"
    if size == (image_size,) and crop == whole:
        return "shortest", []
    if size == whole and crop in (None, whole):
        return "squash", []
    ours = f"the shorter side to {image_size}, then the centre {image_size} x {image_size}"
    resize = "squash" if size is not None and len(size) == 2 else "shortest"
    return resize, [f"preprocessing.size: {way} in the model, {ours} in clipx"]


def _size(section: Section, key: str, square: bool, default: tuple[int, ...]) -> tuple[int, ...]:
    """(shorter side,) or (height, width) of a size as transformers writes it: a number, a pair, or
    an object. square: whether a number means both sides."""
    value = section.get(key)
    if value is None:
        return default
    if isinstance(value, int | float):
        side = section.size(key)
        return (side, side) if square else (side,)
    if isinstance(value, list) and len(value) == 2:
        value = {"height": value[0], "width": value[1]}
    sizes = Section(value, section.at(key), key)
    names = ("shortest_edge",) if "shortest_edge" in sizes else ("height", "width")
    found = tuple(sizes.size(name) for name in names)
    if unknown := sizes.unread():
        expected = "shortest_edge, or height and width"
        raise ConfigError(section.at(key), unknown[0].partition(": ")[0], expected)
    return found


def _interpolation(section: Section) -> tuple[Interpolation, list[str]]:
    given = section.get("resample", RESAMPLE["bicubic"])
    number = isinstance(given, int) and 0 <= given < len(_FILTERS)
    name = _FILTERS[given] if number else str(given).lower()
    for known in RESAMPLE:
        if name == known:
            return known, []
    return "bicubic", [f"preprocessing.resample: {name} in the model, bicubic in clipx"]
