"""Vision encoders of transformers (5.x): the models whose features are a class token, SigLIP's
pooling, or a ResNet's mean."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

from clipx.errors import ConfigError
from clipx.interop import bert_layout, huggingface_layout, resnet_layout, vit_layout
from clipx.interop.base import read_json
from clipx.interop.encoders.base import Encoder
from clipx.interop.encoders.common import reader
from clipx.interop.huggingface_layout import HARMLESS
from clipx.interop.model import vit_shape
from clipx.interop.preprocessing import normalisation
from clipx.interop.rules import Arrays, Rule
from clipx.interop.settings import Section, keys
from clipx.models.base import Tower
from clipx.models.resnet import PLAIN, ResNet
from clipx.models.vit import ViT
from clipx.ops import photometry

PREPROCESSOR = "preprocessor_config.json"
_HARMLESS = HARMLESS | keys(
    "num_channels encoder_stride pooler_act pooler_output_size out_features out_indices "
    "stage_names reshape_hidden_states apply_layernorm drop_path_rate layerscale_value "
    "use_mask_token mask_ratio norm_pix_loss decoder_hidden_size decoder_intermediate_size "
    "decoder_num_attention_heads decoder_num_hidden_layers"
)
# layers above the features, and what only training uses
_LEFT_OUT = re.compile(
    r"(?:pooler|classifier|cls_classifier|distillation_classifier|decoder)\.|embeddings\.mask_token$"
)
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_IMAGENET = (photometry.IMAGENET_MEAN, photometry.IMAGENET_STD)
_PICTURES = {"vit": _HALF, "siglip_vision_model": _HALF}  # mean and std, if no file has them
KINDS = (
    "vit",
    "deit",
    "vit_mae",
    "dinov2",
    "dinov2_with_registers",
    "siglip_vision_model",
    "resnet",
)


def describes(values: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is one of transformers."""
    return "model_type" in values


def describe(
    values: Mapping[str, Any], folder: pathlib.Path, arrays: Callable[[], Arrays], where: str
) -> Encoder:
    """The encoder that `values`, the content of `config.json` in `folder`, describes."""
    config = Section(values, str(folder / "config.json"), harmless=_HARMLESS)
    kind = config.get("model_type")
    if kind not in KINDS:
        fix = "name it as config.init_from" if kind in ("clip", "siglip") else ""
        raise ConfigError(config.at("model_type"), repr(kind), f"one of {', '.join(KINDS)}", fix)
    pictures, side, notes = _pictures(folder, kind, where)
    if kind == "resnet":
        tower, layout = _resnet(config, side or 224)
    else:
        tower, layout = _vit(config, kind)
        if side and side != tower.image_size:
            notes.append(
                f"transformers shows it pictures of {side} pixels, and it has positions for "
                f"{tower.image_size}: config.image.image_size={side} resizes them"
            )
    if kind == "siglip_vision_model":
        plain, prefix = arrays, "vision_model."
        arrays = lambda: {prefix + name: x for name, x in plain().items()}  # noqa: E731
    if kind in ("vit", "deit", "vit_mae"):
        notes.append(
            "features are the class token after the last norm, without transformers' pooler"
        )
    return Encoder(
        layout="transformers",
        tower=tower,
        read=reader(tower, layout, arrays, _LEFT_OUT, where),
        preprocessing=pictures,
        notes=tuple(notes),
        differences=tuple(config.unread("image.settings")),
    )


def _common(config: Section, eps: float, activation: str) -> dict[str, Any]:
    known = {theirs: ours for ours, all_ in bert_layout.ACTIVATIONS.items() for theirs in all_}
    known = {theirs: ours for theirs, ours in known.items() if ours != "relu"}
    return {
        "activation": known[config.one_of("hidden_act", known, activation)],
        "norm_eps": config.number("layer_norm_eps", eps),
        "embed_dim": 0,
        "dtype": "float32",
    }


def _vit(config: Section, kind: str) -> tuple[ViT, list[Rule]]:
    if kind == "siglip_vision_model":
        tower = huggingface_layout.vision_tower(config, 0, siglip=True).clone(dtype="float32")
        return tower, huggingface_layout.siglip_vision(tower)
    dino = kind.startswith("dinov2")
    width = config.size("hidden_size", 768)
    if dino:
        config.one_of("use_swiglu_ffn", (False,), False)
        mlp_width = config.mlp_width(width)
    else:
        mlp_width = config.size("intermediate_size", 3072)
    depth, heads = config.depth("num_hidden_layers", 12), config.size("num_attention_heads", 12)
    registers = 0
    if kind == "dinov2_with_registers":
        registers = config.size("num_register_tokens", 4)
    elif kind == "deit":
        registers = 1  # the token of distillation, which takes part in attention alone
    tower = ViT(
        **vit_shape(
            (width, depth, heads, mlp_width), config.size("patch_size", 14 if dino else 16)
        ),
        image_size=config.size("image_size", 224),
        pre_norm=False,
        registers=registers,
        layer_scale=1.0 if dino else None,
        **_common(config, 1e-6 if dino else 1e-12, "gelu"),
    )
    names = vit_layout.DINO if dino else vit_layout.PLAIN
    if kind == "deit":
        names = names._replace(registers="embeddings.distillation_token")
    # only DeiT's second token has a position
    layout = vit_layout.layout(
        tower,
        names,
        positioned="with_class" if dino else "all",
        qkv_bias=config.flag("qkv_bias", True),
    )
    return tower, layout


def _resnet(config: Section, size: int) -> tuple[Tower, list[Rule]]:
    config.one_of("hidden_act", ("relu",), "relu")
    config.one_of("downsample_in_first_stage", (False,), False)
    config.one_of("downsample_in_bottleneck", (False,), False)
    bottleneck = config.one_of("layer_type", ("bottleneck", "basic"), "bottleneck") == "bottleneck"
    blocks = tuple(config.get("depths", (3, 4, 6, 3)))
    width = config.size("embedding_size", 64)
    sizes = tuple(width * 2**i * (4 if bottleneck else 1) for i in range(len(blocks)))
    if tuple(config.get("hidden_sizes", (256, 512, 1024, 2048))) != sizes:
        raise ConfigError(config.at("hidden_sizes"), str(config.get("hidden_sizes")), str(sizes))
    known = {shape: name for name, shape in PLAIN.items()}
    variant = known.get((blocks, bottleneck), "resnet50" if bottleneck else "resnet18")
    given: dict[str, Any] = {} if PLAIN[variant][0] == blocks else {"blocks": blocks}
    given |= {} if width == 64 else {"width": width}
    tower = ResNet(variant=variant, image_size=size, embed_dim=0, dtype="float32", **given)
    return tower, resnet_layout.layout(tower, names="transformers")


def _pictures(
    folder: pathlib.Path, kind: str, where: str
) -> tuple[dict[str, Any], int | None, list[str]]:
    """(mean and std, pixels of a side if the file tells, notes)."""
    values = read_json(folder / PREPROCESSOR, where)
    default = _PICTURES.get(kind, _IMAGENET)
    section = Section(values or {}, str(folder / PREPROCESSOR))
    mean, std = normalisation(section, default)
    notes = []
    if values is None:
        notes.append(f"mean and std are those of {kind}, as {folder} has no {PREPROCESSOR}")
    side = None
    for key in ("size", "crop_size"):
        size = section.get(key)
        if isinstance(size, Mapping):
            size = size.get("height", size.get("shortest_edge"))
        side = size if isinstance(size, int) else side
    if section.get("resample", 3) != 3:
        notes.append("transformers resizes pictures by another interpolation than bicubic")
    if (share := section.get("crop_pct", 1)) != 1:
        notes.append(f"transformers shows the centre {share:.3g} of a picture, clipx all of it")
    return {"mean": mean, "std": std}, side, notes
