"""timm's `config.json`: an architecture's name, its arguments, and what its pictures look like."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from clipx.errors import ConfigError
from clipx.interop import timm_models
from clipx.interop.encoders.base import Encoder
from clipx.interop.encoders.common import reader
from clipx.interop.rules import Arrays
from clipx.interop.settings import Section, keys
from clipx.ops import photometry

# keys that change no feature
_HARMLESS = keys("num_classes num_features global_pool label_names label_descriptions")
_CFG_HARMLESS = keys(
    "url file hf_hub_id architecture tag custom_load num_classes pool_size first_conv classifier "
    "license origin_url paper_ids paper_name fixed_input_size min_input_size source notes source "
    "hf_hub_filename state_dict test_input_size test_crop_pct label_names label_descriptions"
)
LEFT_OUT = re.compile(r"(?:classifier|fc)\.|head\.(?!norm\.)")  # ConvNeXt has its last norm there


def describes(values: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is timm's."""
    return "architecture" in values


def describe(
    values: Mapping[str, Any], file: str, arrays: Callable[[], Arrays], where: str
) -> Encoder:
    """The encoder that `values`, the content of the config `file`, describes."""
    section = Section(values, file, harmless=_HARMLESS)
    name = str(section.get("architecture")).partition(".")[0]
    config = section.section("pretrained_cfg", _CFG_HARMLESS)
    args = section.section("model_args", timm_models.HARMLESS)
    size, preprocessing, notes = _pictures(config)
    found = timm_models.build(name, args, size, section.at("architecture"))
    tower, layout = found.tower, found.layout
    unread = [line for part in (section, config, args) for line in part.unread("image.settings")]
    return Encoder(
        layout="timm",
        tower=tower,
        read=reader(tower, layout, arrays, LEFT_OUT, where),
        preprocessing=preprocessing,
        notes=notes,
        differences=tuple(unread),
    )


def _pictures(config: Section) -> tuple[int, dict[str, Any], tuple[str, ...]]:
    """(pixels of a side, mean and std, how timm prepares pictures otherwise than clipx)."""
    given = config.get("input_size", (3, 224, 224))
    if (
        not isinstance(given, list | tuple)
        or len(given) != 3
        or given[0] != 3
        or given[1] != given[2]
    ):
        raise ConfigError(config.at("input_size"), repr(given), "[3, side, side]")
    preprocessing = {
        "mean": _three(config, "mean", photometry.IMAGENET_MEAN),
        "std": _three(config, "std", photometry.IMAGENET_STD),
    }
    notes = []
    share, way = config.get("crop_pct", 0.875), config.get("interpolation", "bicubic")
    if share != 1:
        notes.append(
            f"timm evaluates with the centre {share:.3g} of a picture, clipx with all of it"
        )
    if way != "bicubic":
        notes.append(f"timm resizes pictures by {way} interpolation, clipx by bicubic")
    if (mode := config.get("crop_mode", "center")) != "center":
        notes.append(f"timm cuts pictures by {mode!r}, clipx cuts the centre")
    return given[1], preprocessing, tuple(notes)


def _three(section: Section, key: str, default: tuple[float, ...]) -> tuple[float, ...]:
    value = section.get(key, default)
    right = isinstance(value, list | tuple) and len(value) == 3
    if not right or not all(isinstance(x, int | float) for x in value):
        raise ConfigError(section.at(key), repr(value), "three numbers")
    return tuple(map(float, value))
