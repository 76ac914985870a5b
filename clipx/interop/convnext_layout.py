"""ConvNeXt in timm (1.0, `convnext.py`): architectures, and names and layouts of arrays."""

from __future__ import annotations

import re
from typing import Any

from clipx.errors import ConfigError
from clipx.interop import rules
from clipx.interop.rules import Rule
from clipx.interop.settings import Section
from clipx.models.convnext import VARIANTS, ConvNeXt

_NAME = re.compile(rf"convnext_({'|'.join(VARIANTS)})$")
_EPS = {"xxlarge": 1e-5}  # of the others: 1e-6


def tower(
    name: str, args: Section, common: dict[str, Any], where: str, pool: str | None
) -> ConvNeXt | None:
    """The tower of timm's architecture `name` with the arguments `args`; None for another kind of
    architecture. common, pool: as for `timm_models.build`. Raises `ConfigError`."""
    match = _NAME.match(name)
    if match is None:
        return None
    args.one_of("global_pool", ("avg",), "avg")
    if pool not in (None, "avg"):
        raise ConfigError(where, f"pooling by {pool!r}", "'avg'")
    blocks, width = VARIANTS[match[1]]
    depths, dims = tuple(args.get("depths", blocks)), tuple(args.get("dims", ()))
    first = dims[0] if dims else width
    if dims and dims != tuple(first * 2**i for i in range(4)):
        raise ConfigError(args.at("dims"), repr(dims), "channels that double from stage to stage")
    sizes: dict[str, Any] = {} if depths == blocks else {"blocks": depths}
    sizes |= {} if first == width else {"width": first}
    return ConvNeXt(
        variant=match[1],
        layer_scale=args.number("ls_init_value", 1e-6),
        norm_eps=args.number("norm_eps", _EPS.get(match[1], 1e-6)),
        **sizes,
        **common,
    )


def arguments(image: Any) -> tuple[str, dict[str, Any]]:
    """(architecture, arguments other than its own) from which timm builds the tower."""
    blocks, width = image.shape
    args: dict[str, Any] = {}
    if blocks != VARIANTS[image.variant][0]:
        args["depths"] = list(blocks)
    if width != VARIANTS[image.variant][1]:
        args["dims"] = [width * 2**i for i in range(4)]
    if image.norm_eps != _EPS.get(image.variant, 1e-6):
        args["norm_eps"] = image.norm_eps
    return f"convnext_{image.variant}", args


def layout(image: ConvNeXt, theirs: str = "") -> list[Rule]:
    """The rules of all arrays below the head. theirs: what stands before the names."""
    ours = "params/image"

    def conv(a: str, b: str) -> list[Rule]:
        return [rules.conv(a, b), rules.same(f"{a}/bias", f"{b}.bias")]

    found = conv(f"{ours}/stem/conv", f"{theirs}stem.0")
    found += rules.norm(f"{ours}/ln_stem", f"{theirs}stem.1")
    for i, count in enumerate(image.shape[0]):
        stage = f"{theirs}stages.{i}"
        if i:
            found += rules.norm(f"{ours}/ln_{i}", f"{stage}.downsample.0")
            found += conv(f"{ours}/down_{i}/conv", f"{stage}.downsample.1")
        for j in range(count):
            a, b = f"{ours}/stage_{i}_{j}", f"{stage}.blocks.{j}"
            found += [
                *conv(a, f"{b}.conv_dw"),
                *rules.norm(f"{a}/ln", f"{b}.norm"),
                *rules.dense(f"{a}/fc", f"{b}.mlp.fc1"),
                *rules.dense(f"{a}/proj", f"{b}.mlp.fc2"),
                rules.same(f"{a}/scale/scale", f"{b}.gamma"),
            ]
    return found + rules.norm(f"{ours}/ln_post", f"{theirs}head.norm")
