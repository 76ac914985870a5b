"""Reads the towers that open_clip builds through timm or transformers, from its config's sections
and the folder's `config.json`. `guests.py` has their arrays."""

from __future__ import annotations

import re
from typing import Any

from clipx.errors import ConfigError
from clipx.interop import bert_layout
from clipx.interop.guests import POOLERS, TIMM_EPS
from clipx.interop.huggingface_layout import HARMLESS
from clipx.interop.model import vit_shape
from clipx.interop.settings import Section, keys
from clipx.models.bert import BERT
from clipx.models.resnet import PLAIN, ResNet
from clipx.models.vit import ViT

# timm's names of SigLIP's ViTs, and clipx's names of their sizes
_SIGLIP = re.compile(r"vit_(base|large|so400m)_patch(\d+)_siglip(?:_gap)?_(\d+)$")
_SIGLIP_SIZES = {"base": "B", "large": "L", "so400m": "So400m"}
# those of them that timm builds with GELU by tanh: patches of SigLIP 2 alone, by size and patch
_TANH = {("base", "32"), ("so400m", "16")}
_TANH_PIXELS = {("large", "16", "512")}
# what timm's `model_args` may also say: nothing that changes an output
_TIMM_HARMLESS = keys(
    "img_size num_classes weight_init drop_rate pos_drop_rate patch_drop_rate proj_drop_rate "
    "attn_drop_rate drop_path_rate fix_init in_chans global_pool"
)
# what else a `config.json` with a BERT may hold: timm's part
_BERT_HARMLESS = bert_layout.HARMLESS | keys(
    "architecture model_args num_classes num_features global_pool pretrained_cfg"
)


def image_tower(section: Section, embed_dim: int, size: int, given: Any) -> ViT | ResNet:
    """The tower that timm builds from open_clip's `vision_cfg`.

    size: pixels of an image's side. given: the content of the folder's `config.json`, which the
    section may point at. Raises `ConfigError` for a timm model that clipx does not have.
    """
    name = section.get("timm_model_name")
    projection = section.one_of("timm_proj", ("linear", "none"), "linear")
    common: dict[str, Any] = {
        "image_size": size,
        "embed_dim": embed_dim if projection == "linear" else 0,
        "projection_bias": section.flag("timm_proj_bias", False),
    }
    for key in ("layers", "width", "head_width", "mlp_ratio", "patch_size"):
        section.get(key)  # which the model's name overrides
    if name in PLAIN:
        section.one_of("timm_pool", ("avg",), "avg")
        return ResNet(variant=name, **common)
    pool = {"map": "attention", "avg": "mean"}
    common |= {
        "pool": pool[section.one_of("timm_pool", pool, "avg")],
        "norm_eps": TIMM_EPS,
    }
    if match := _SIGLIP.match(str(name)):
        family, patch, pixels = match.groups()
        tanh = (family, patch) in _TANH or (family, patch, pixels) in _TANH_PIXELS
        _check_patch(section, size, int(patch))
        return ViT(
            variant=f"ViT-{_SIGLIP_SIZES[family]}/{patch}",
            pre_norm=False,
            activation="gelu_tanh" if tanh else "gelu",
            **common,
        )
    args = Section(given, "config.json").section("model_args", _TIMM_HARMLESS)
    if not str(name).startswith("local-dir:") or args.flag("class_token", True):
        known = f"{', '.join(PLAIN)}, a SigLIP ViT, or local-dir:FOLDER with a ViT that clipx wrote"
        raise ConfigError(section.at("timm_model_name"), repr(name), known)
    width, patch = args.size("embed_dim"), args.size("patch_size")
    args.one_of("fc_norm", (False,), False)
    _check_patch(section, size, patch)
    tower = ViT(
        **vit_shape(
            (
                width,
                args.depth("depth"),
                args.size("num_heads"),
                args.mlp_width(width),
            ),
            patch,
        ),
        pre_norm=args.flag("pre_norm", False),
        activation=args.one_of("act_layer", ("gelu", "quick_gelu", "gelu_tanh"), "gelu"),
        **common,
    )
    if unknown := args.unread():
        raise ConfigError("config.json: model_args", unknown[0], "arguments that clipx knows")
    return tower


def _check_patch(section: Section, size: int, patch: int) -> None:
    if size % patch:
        found = f"{size} pixels with a patch of {patch}"
        raise ConfigError(section.at("image_size"), found, "a multiple of the patch")


def text_tower(section: Section, embed_dim: int, given: Any) -> BERT:
    """The BERT that transformers builds from open_clip's `text_cfg` and `given`, the content of the
    folder's `config.json`. Raises `ConfigError` for another model."""
    guest = Section(given, "config.json", harmless=HARMLESS | _BERT_HARMLESS)
    if guest.get("model_type") != "bert":
        name = section.get("hf_model_name")
        found = f"{name!r}, but no config.json of a BERT in the folder"
        raise ConfigError(section.at("hf_model_name"), found, "a BERT with its config.json there")
    pools = {theirs: ours for ours, theirs in POOLERS.items()}
    pool: Any = pools[section.one_of("hf_pooler_type", pools, "mean_pooler")]
    section.one_of("hf_proj_type", ("linear",), "mlp")
    for key in ("vocab_size", "width", "heads", "layers"):
        section.get(key)  # which config.json overrides
    _, pad_id, fields = bert_layout.read_config(guest, "config.json")
    tower = BERT(
        **fields,
        pool=pool,
        context=section.size("context_length", 77),
        pad_id=pad_id,
        eot_id=guest.whole("sep_token_id", BERT.eot_id),
        embed_dim=embed_dim,
    )
    if unknown := guest.unread():
        raise ConfigError("config.json", unknown[0], "settings that clipx knows")
    return tower
