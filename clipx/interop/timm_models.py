"""timm's architectures: their names, their arguments, and the towers that they are in clipx (timm
1.0, `vision_transformer.py`, `deit.py`, `resnet.py`, `efficientnet.py`)."""

from __future__ import annotations

import re
from typing import Any, Literal, NamedTuple

from clipx.errors import ConfigError
from clipx.interop import (
    convnext_layout,
    efficientnet_layout,
    eva_layout,
    resnet_layout,
    vit_layout,
    vitamin_layout,
)
from clipx.interop.model import vit_shape
from clipx.interop.rules import Rule
from clipx.interop.settings import Section, keys
from clipx.models.base import Tower
from clipx.models.efficientnet import EfficientNet
from clipx.models.resnet import PLAIN, ResNet
from clipx.models.vit import ViT

# arguments that change no output of a model that does not train
HARMLESS = keys(
    "img_size num_classes weight_init drop_rate pos_drop_rate patch_drop_rate proj_drop_rate "
    "attn_drop_rate drop_path_rate drop_block_rate fix_init in_chans dynamic_img_size "
    "dynamic_img_pad zero_init_last pretrained"
)
KNOWN = (
    "resnet18 to resnet152 and resnet18d to resnet152d, efficientnet_b0 to b3 and lite0 to lite4 "
    "with or without tf_, convnext_tiny to convnext_xxlarge, EVA-CLIP's and PE-Core's towers, "
    "vitamin_small_224 to vitamin_xlarge_384, or a ViT: vit_SIZE_patchN_..., deit_..., deit3_..."
)
# of every LayerNorm that timm's ViT makes, and of those whose name says that they are CLIP's
VIT_EPS, CLIP_EPS = 1e-6, 1e-5


_OWN = ("linear", "none", "own")


class Found(NamedTuple):
    """A tower, without a projection and in float32, and the layout of its arrays."""

    tower: Tower
    layout: list[Rule]  # without prefix
    common: bool = True  # whether the layout is the one that clipx writes for such a tower
    # what open_clip may put above the network: "own" is the network's classifier
    projections: tuple[str, ...] = ("linear", "none")


def build(name: str, args: Section, size: int, where: str, pool: str | None = None) -> Found:
    """The tower of the architecture `name` with the arguments `args`, for images of `size` pixels.
    pool: timm's name of another pooling than the one that the model is made with.

    Raises `ConfigError` at `where` for an architecture that clipx does not have, and at an argument
    for such a value.
    """
    for known in (_efficientnet, _resnet, _convnext, _eva, _vitamin, _vit):
        fields = {"image_size": size, "embed_dim": 0, "dtype": "float32"}
        found = known(name, args, fields, where, pool)
        if found is not None:
            return found
    raise ConfigError(where, repr(name), KNOWN)


_EFFICIENTNET = re.compile(r"(tf_)?(efficientnet_(?:b[0-3]|lite[0-4]))$")


def _efficientnet(
    name: str, args: Section, common: dict[str, Any], where: str, pool: str | None
) -> Found | None:
    match = _EFFICIENTNET.match(name)
    if match is None:
        return None
    _mean_pooled(args, where, pool)
    pad = args.one_of("pad_type", ("", "same"), "same" if match[1] else "")
    tower = EfficientNet(
        variant=match[2],
        padding="same" if pad else "symmetric",
        norm_eps=args.number("bn_eps", 1e-3 if match[1] else 1e-5),
        norm_momentum=args.number("bn_momentum", 0.1),
        **common,
    )
    return Found(tower, efficientnet_layout.layout(tower, "timm"))


_RESNET = re.compile(rf"({'|'.join(PLAIN)})(d?)$")


def _resnet(
    name: str, args: Section, common: dict[str, Any], where: str, pool: str | None
) -> Found | None:
    match = _RESNET.match(name)
    if match is None:
        return None
    deep = bool(match[2])
    _mean_pooled(args, where, pool)
    args.one_of("stem_type", ("deep",) if deep else ("",), "deep" if deep else "")
    args.one_of("avg_down", (deep,), deep)
    args.one_of("stem_width", (32,) if deep else (64,), 32 if deep else 64)
    tower = ResNet(variant=match[1], deep_stem=deep, **common)
    return Found(tower, resnet_layout.layout(tower))


def _convnext(name: str, *given: Any) -> Found | None:
    tower = convnext_layout.tower(name, *given)
    return (
        None
        if tower is None
        else Found(tower, convnext_layout.layout(tower), projections=("linear", "none", "mlp"))
    )


def _vitamin(name: str, *given: Any) -> Found | None:
    tower = vitamin_layout.tower(name, *given)
    return None if tower is None else Found(tower, vitamin_layout.layout(tower))


def _eva(name: str, *given: Any) -> Found | None:
    tower = eva_layout.tower(name, *given)
    return None if tower is None else Found(tower, eva_layout.layout(tower), projections=_OWN)


# width, depth, heads, ratio of the MLP
_SIZES = {
    "wee": (256, 14, 4, 5),
    "little": (320, 14, 5, 5.6),
    "tiny": (192, 12, 3, 4),
    "xsmall": (256, 10, 4, 4),
    "small": (384, 12, 6, 4),
    "medium": (512, 12, 8, 4),
    "mediumd": (512, 20, 8, 4),
    "betwixt": (640, 12, 10, 4),
    "base": (768, 12, 12, 4),
    "so150m": (896, 18, 14, 2.572),
    "so150m2": (832, 21, 13, 2.6153846153846154),
    "large": (1024, 24, 16, 4),
    "so400m": (1152, 27, 16, 3.7362),
    "huge": (1280, 32, 16, 4),
    "giant": (1408, 40, 16, 4.363636363636363),
    "giantopt": (1536, 40, 16, 4),
    "gigantic": (1664, 48, 16, 4.923076923076923),
}
_VIT = re.compile(
    rf"(?:vit|deit|deit3)_({'|'.join(_SIZES)})_patch(\d+)(?:_reg(\d))?"
    r"(_dinov2|_siglip|_clip(?:_quickgelu)?|_tipsv2|_miil)?(_gap|_map)?(?:_(\d+))?(_miil)?$"
)
# SigLIP 2's models, the only ones of timm with GELU by tanh
_TANH = re.compile(r"vit_(?:base_patch32|(?:so400m|giantopt)_patch16|large_patch16)_siglip\w*$")


def vit_arguments(name: str) -> dict[str, Any] | None:
    """What timm builds the ViT `name` from; None for a ViT that clipx does not have."""
    match = _VIT.match(name)
    if match is None or (match[1] == "giant" and match[4] in ("_dinov2", "_tipsv2")):
        return None  # whose MLPs are gated
    size, patch, registers, family, pool = match.group(1, 2, 3, 4, 5)
    family = family or match[7] or ""
    width, depth, heads, ratio = _SIZES[size]
    gap, clip, deit3 = pool == "_gap", family.startswith("_clip"), name.startswith("deit3_")
    siglip, so150m = family == "_siglip", size.startswith("so150m")
    tanh = siglip and _TANH.match(name) and (size != "large" or match[6] == "512")
    scaled = {"_dinov2": 1e-5, "_tipsv2": 1.0}.get(family, 1e-6 if deit3 else None)
    if gap and (registers or size in ("medium", "betwixt")) and size != "so150m":
        scaled = (1e-5 if registers else 1e-6) if size != "base" else None
    plain_gap = gap and not registers
    unbiased = plain_gap and size in ("medium", "betwixt")
    unbiased = unbiased or family == "_miil" or size == "so150m2"
    return {
        "embed_dim": width,
        "depth": depth,
        "num_heads": 16 if name.startswith("vit_base_patch16_gap") else heads,
        "mlp_ratio": ratio,
        "patch_size": int(patch),
        "class_token": not (gap or siglip or pool == "_map"),
        "reg_tokens": int(registers or 0),
        "no_embed_class": deit3 or bool(registers) and not so150m,
        "global_pool": "avg" if gap else "map" if siglip or pool == "_map" else "token",
        "fc_norm": False if gap and (plain_gap or size == "so150m") else None,
        "pre_norm": clip,
        "init_values": scaled,
        "qkv_bias": not unbiased,
        "act_layer": "quick_gelu" if "quickgelu" in family else "gelu_tanh" if tanh else "gelu",
        "norm_eps": CLIP_EPS if clip else VIT_EPS,
    }  # fmt: skip


def _mean_pooled(args: Section, where: str, pool: str | None) -> None:
    """Raises `ConfigError` unless a convolutional network ends in the mean of its last map."""
    args.one_of("global_pool", ("avg",), "avg")
    if pool not in (None, "avg"):
        raise ConfigError(where, f"pooling by {pool!r}", "'avg'")


_POOLS: dict[str, Literal["class", "mean", "attention"]] = {
    "token": "class",
    "avg": "mean",
    "map": "attention",
}


def _vit(
    name: str, args: Section, common: dict[str, Any], where: str, pool: str | None
) -> Found | None:
    if "distilled" in name:
        found = f"{name!r}, which has a second class token for distillation"
        raise ConfigError(where, found, f"the model without it, {name.replace('_distilled', '')}")
    given = vit_arguments(name)
    if given is None:
        return None
    for key in ("qk_norm", "scale_attn_norm", "scale_mlp_norm", "pool_include_prefix"):
        args.one_of(key, (False,), False)
    args.one_of("proj_bias", (True,), True)
    args.one_of("final_norm", (True,), True)
    args.one_of("pos_embed", ("learn",), "learn")
    width = args.size("embed_dim", given["embed_dim"])
    made_with = args.one_of("global_pool", _POOLS, given["global_pool"])
    pool = made_with if pool is None else pool
    if pool not in _POOLS:
        raise ConfigError(where, f"pooling by {pool!r}", " or ".join(map(repr, _POOLS)))
    fc_norm = args.get("fc_norm", given["fc_norm"])
    pre_norm = args.flag("pre_norm", given["pre_norm"])
    scale = args.get("init_values", given["init_values"])
    known = ("gelu", "quick_gelu", "gelu_tanh")
    ratio = args.number("mlp_ratio", given["mlp_ratio"])
    shape = (
        width,
        args.depth("depth", given["depth"]),
        args.size("num_heads", given["num_heads"]),
        int(width * ratio),
    )
    norm_after = made_with == "avg" if fc_norm is None else bool(fc_norm)
    if norm_after and pool != "avg":
        raise ConfigError(args.at("fc_norm"), f"{fc_norm} with global_pool={pool!r}", "false")
    registers = args.whole("reg_tokens", given["reg_tokens"])
    patch = args.size("patch_size", given["patch_size"])
    tower = ViT(
        **vit_shape(shape, patch),
        uneven=common["image_size"] % patch != 0,  # which a convolution leaves out
        pool=_POOLS[pool],
        class_token=args.flag("class_token", given["class_token"]),
        registers=registers,
        norm_pooled=norm_after,
        pre_norm=pre_norm,
        layer_scale=None if scale is None else float(scale),
        activation=args.one_of("act_layer", known, given["act_layer"]),
        norm_eps=given["norm_eps"],
        **common,
    )
    bare = args.flag("no_embed_class", given["no_embed_class"])
    biased = args.flag("qkv_bias", given["qkv_bias"])
    positioned = "patches" if bare else "all"
    layout = vit_layout.layout(tower, vit_layout.TIMM, positioned=positioned, qkv_bias=biased)
    if pool == "map":
        layout += vit_layout.map_head(tower.shape[2], "attn_pool")
    same = positioned == vit_layout.default_positions(tower)
    same = biased and (same or not (registers or tower.has_class))
    known_eps = (VIT_EPS, CLIP_EPS) if tower.pre_norm else (VIT_EPS,)
    return Found(tower, layout, same and tower.norm_eps in known_eps, _OWN)
