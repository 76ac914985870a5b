"""ViTamin in timm (1.0, `vitamin.py`): architectures, and names and layouts of arrays."""

from __future__ import annotations

import re
from typing import Any

from clipx.errors import ConfigError, NotExpressible
from clipx.interop import rules
from clipx.interop.rules import Rule
from clipx.interop.settings import Section
from clipx.models.vitamin import STAGES, VARIANTS, ViTamin

_NAME = re.compile(rf"vitamin_({'|'.join(VARIANTS)}|large2)_(\d+)$")
_SIDES = {"small": (224,), "base": (224,), "large": (224, 256, 336, 384), "xlarge": (256, 336, 384)}


def tower(
    name: str, args: Section, common: dict[str, Any], where: str, pool: str | None
) -> ViTamin | None:
    """The tower of timm's architecture `name` with the arguments `args`; None for another kind of
    architecture. common, pool: as for `timm_models.build`. Raises `ConfigError`."""
    match = _NAME.match(name)
    if match is None:
        return None
    args.one_of("global_pool", ("avg",), "avg")
    if pool not in (None, "avg"):
        raise ConfigError(where, f"pooling by {pool!r}", "'avg'")
    variant = match[1].removesuffix("2")  # "large2" is what goes with a larger text tower
    depth = args.depth("depth", VARIANTS[variant][1])
    given: dict[str, Any] = {} if depth == VARIANTS[variant][1] else {"depth": depth}
    # timm makes the positions for the size in the name, whatever open_clip's config says
    given |= {**common, "image_size": int(match[2])}
    return ViTamin(variant=variant, **given)


def architecture(image: Any) -> tuple[str, dict[str, Any]]:
    """(architecture, arguments other than its own) from which timm builds the tower. Raises
    `NotExpressible`."""
    widths, depth, heads, positions = image.shape
    default = VARIANTS[image.variant]
    sides = _SIDES[image.variant]
    known = (widths, heads, positions) == (default[0], *default[2:]) and image.norm_eps == 1e-6
    if not known or image.mlp_ratio != 2 or image.image_size not in sides:
        raise NotExpressible(
            f"timm's ViTamin of the size {image.variant!r} has other widths, heads or norms, or "
            f"images of other than {' or '.join(map(str, sides))} pixels"
        )
    args = {} if depth == default[1] else {"depth": depth}
    return f"vitamin_{image.variant}_{image.image_size}", args


def layout(image: ViTamin, theirs: str = "") -> list[Rule]:
    """The rules of all arrays below the head. theirs: what stands before the names."""
    ours, backbone = "params/image", f"{theirs}patch_embed.backbone."
    _, depth, heads, positions = image.shape

    def conv(a: str, b: str) -> list[Rule]:
        return [rules.conv(f"{ours}/{a}", b), rules.same(f"{ours}/{a}/bias", f"{b}.bias")]

    found = conv("conv1", f"{backbone}stem.conv1") + conv("conv2", f"{backbone}stem.conv2")
    found += rules.norm(f"{ours}/ln_stem", f"{backbone}stem.norm1")
    widths = (image.shape[0][0], *image.shape[0][:-1])
    for i, count in enumerate(STAGES):
        for j in range(count):
            a, b = f"stage_{i}_{j}", f"{backbone}stages.{i}.{j}"
            found += [
                *rules.norm(f"{ours}/{a}/ln", f"{b}.pre_norm"),
                *rules.pointwise(f"{ours}/{a}/expand", f"{b}.conv1_1x1"),
                *conv(a, f"{b}.conv2_kxk"),
                *rules.pointwise(f"{ours}/{a}/project", f"{b}.conv3_1x1"),
            ]
            if not j and widths[i] != widths[i + 1]:
                found += rules.pointwise(f"{ours}/{a}/shortcut", f"{b}.shortcut.expand")
    found += rules.norm(f"{ours}/ln_conv", f"{backbone}pool.norm")
    found += conv("conv3", f"{backbone}pool.proj")
    if positions:
        table = f"{theirs}pos_embed"
        position = f"{ours}/positional_embedding"
        found.append(Rule((position,), (table,), lambda x: (x[None],), lambda x: (x[0],)))
    for i in range(depth):
        a, b = f"{ours}/block_{i}", f"{theirs}blocks.{i}"
        found += [
            *rules.norm(f"{a}/ln_1", f"{b}.norm1"),
            *rules.heads_in((f"{a}/attn/qkv",), (f"{b}.attn.qkv",), heads, (3,)),
            *rules.heads_out(f"{a}/attn/out", f"{b}.attn.proj", heads),
            *rules.norm(f"{a}/ln_2", f"{b}.norm2"),
            *rules.norm(f"{a}/mlp/ln", f"{b}.mlp.norm"),
            *rules.dense(f"{a}/mlp/gate", f"{b}.mlp.w0"),
            *rules.dense(f"{a}/mlp/fc", f"{b}.mlp.w1"),
            *rules.dense(f"{a}/mlp/proj", f"{b}.mlp.w2"),
        ]
    return found + rules.norm(f"{ours}/ln_post", f"{theirs}fc_norm")
