"""Image towers that open_clip builds through timm: ViTs that it does not have itself, EVA, the
plain ResNet, EfficientNet, ConvNeXt and ViTamin.

timm builds the published ones from their name. Others need a `config.json` in the export.
open_clip's config must give the full path of that folder, because open_clip does not pass its own
folder on to timm.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from clipx.errors import NotExpressible
from clipx.interop import (
    convnext_layout,
    efficientnet_layout,
    eva_layout,
    resnet_layout,
    rules,
    vit_layout,
    vitamin_layout,
)
from clipx.interop.model import Model, ratio
from clipx.interop.open_clip_layout import Layout
from clipx.interop.rules import Rule
from clipx.interop.timm_models import CLIP_EPS, VIT_EPS
from clipx.models.base import Tower
from clipx.models.convnext import ConvNeXt
from clipx.models.efficientnet import EfficientNet
from clipx.models.eva import EVA
from clipx.models.resnet import PLAIN, ResNet
from clipx.models.vit import ViT
from clipx.models.vitamin import ViTamin

_POOLS = {"class": "token", "mean": "avg", "attention": "map"}  # ours and timm's


# the network's own classifier, which is the projection where open_clip adds none
OWN_HEAD = "visual.trunk.head"
HEAD = "visual.head.proj"


def _timm_section(
    name: str, pool: str, model: Model, folder: str = "", own: bool = False, factor: float = 1.0
) -> dict[str, Any]:
    """A tower's section. own: whether the network's classifier is a projection with a bias. factor:
    as of `head`."""
    image = model.image
    projected, biased = bool(image.embed_dim), bool(image.embed_dim) and image.biased_projection
    way: dict[str, Any] = {"timm_proj": "linear"}
    if biased and own:
        way = {"timm_proj": None}
    elif biased:
        way |= {"timm_proj_bias": True}
    elif not projected and image.backbone_width == model.width and factor == 1:
        way = {"timm_proj": "none"}
    return {
        "image_size": image.image_size,
        "timm_model_name": f"local-dir:{folder}" if folder else name,
        "timm_model_pretrained": False,
        "timm_pool": pool,
        **way,
    }


def _vit_section(model: Model, folder: str) -> dict[str, Any]:
    if model.image.pool not in _POOLS:
        raise NotExpressible(f"timm's ViT does not pool by {model.image.pool!r}")
    factor = _scale(model.image) if model.image.pool == "attention" else 1.0
    return _timm_section("", _POOLS[model.image.pool], model, folder, True, factor)


def _vit_config(model: Model) -> dict[str, Any]:
    """The content of `config.json` from which timm builds the ViT."""
    image = model.image
    width, depth, heads, mlp_width, patch = image.shape
    more: dict[str, Any] = {}
    if image.registers:
        more = {"reg_tokens": image.registers, "no_embed_class": True}
    if image.layer_scale is not None:
        more["init_values"] = image.layer_scale
    args = {
        "img_size": image.image_size,
        "patch_size": patch,
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
        "mlp_ratio": ratio(mlp_width, width),
        "class_token": image.has_class,
        "global_pool": _POOLS[image.pool],
        "fc_norm": image.norm_pooled,
        "pre_norm": image.pre_norm,
        "act_layer": image.activation,
        **more,
    }
    family = "_clip" if _is_clip(image) else ""
    return _config(model, f"vit_base_patch16{family}_224", args)  # which override its sizes


def _config(model: Model, architecture: str, args: dict[str, Any]) -> dict[str, Any]:
    """The content of a `config.json` from which timm builds an architecture with arguments."""
    return {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": model.image.backbone_width,
        "model_args": args,
        "pretrained_cfg": {
            "input_size": [3, model.image.image_size, model.image.image_size],
            "mean": list(model.mean),
            "std": list(model.std),
            "num_classes": 0,
        },
    }


def _eva_section(model: Model, folder: str) -> dict[str, Any]:
    eva_layout.arguments(model.image)  # raises `NotExpressible`
    return _timm_section("", _POOLS[model.image.pool], model, folder, own=True)


def _eva_config(model: Model) -> dict[str, Any]:
    return _config(model, *eva_layout.arguments(model.image))


def _convnext_section(model: Model, folder: str) -> dict[str, Any]:
    image = model.image
    name, args = convnext_layout.arguments(image)
    section = _timm_section(name, "avg", model, folder if args else "")
    if not image.hidden:
        return section
    if image.hidden != 2 * model.width or not image.embed_dim:
        raise NotExpressible(
            f"open_clip's MLP above timm's networks is twice as wide as the shared space, "
            f"{2 * model.width} channels, and this one has {image.hidden}"
        )
    return section | {"timm_proj": "mlp"}


def _convnext_config(model: Model) -> dict[str, Any]:
    name, args = convnext_layout.arguments(model.image)
    return _config(model, name, args) if args else {}


def _resnet_section(model: Model, folder: str) -> dict[str, Any]:
    image = model.image
    if image.shape != (PLAIN[image.variant][0], 64):
        raise NotExpressible(
            f"timm's {image.variant} has {PLAIN[image.variant][0]} blocks and a stem of 64 "
            f"channels, but this one has {image.shape[0]} blocks and {image.shape[1]} channels"
        )
    if image.norm_eps != ResNet.norm_eps:
        raise NotExpressible(f"timm's ResNet has norm_eps={ResNet.norm_eps}, not {image.norm_eps}")
    name = image.variant + "d" * image.deep_stem
    return _timm_section(name, "avg", model)


def _efficientnet_section(model: Model, folder: str) -> dict[str, Any]:
    image = model.image
    if image.shape != EfficientNet(variant=image.variant).shape:
        raise NotExpressible(f"timm's {image.variant} has another width or depth than this one")
    known = {("symmetric", 1e-5): "", ("same", 1e-3): "tf_"}
    prefix = known.get((image.padding, image.norm_eps))
    if prefix is None:
        raise NotExpressible(
            f"timm has no {image.variant} with padding={image.padding} and norm_eps="
            f"{image.norm_eps}, only symmetric with 1e-5 and same with 1e-3"
        )
    return _timm_section(prefix + image.variant, "avg", model)


def head(tower: Tower, width: int, ours: str, theirs: str, factor: float = 1.0) -> list[Rule]:
    """The projection to the shared space, with its kernel multiplied by `factor`. One that copies
    its input where the tower has none and is of another width."""
    if tower.embed_dim:
        kernel, *bias = rules.dense(ours, theirs, bias=tower.biased_projection)
        return [*rules.scaled([kernel], factor), *bias]
    if tower.backbone_width == width and factor == 1:
        return []
    copy = rules.identity(width, tower.backbone_width)
    return [rules.constant(f"{theirs}.weight", lambda: np.float32(factor) * copy())]


def _own_head(image: Tower) -> str:
    """The name of the projection of a tower whose network has a classifier with a bias."""
    return OWN_HEAD if image.embed_dim and image.biased_projection else HEAD


def _is_clip(image: Any) -> bool:
    """Whether timm has the tower with the norms that it keeps for CLIP's."""
    return image.pre_norm and image.norm_eps == CLIP_EPS


def _scale(image: Any) -> float:
    """The factor of the tokens between the blocks of an exported ViT."""
    return 1.0 if _is_clip(image) else float((VIT_EPS / image.norm_eps) ** 0.5)


def _vit_rules(image: ViT, width: int, dropped: int | None) -> list[Rule]:
    """The rules of timm's ViT. Its LayerNorms add 1e-6 to the variance, unless they are CLIP's. The
    tokens between blocks are therefore scaled so that 1e-6 is the same fraction of their variance
    as `norm_eps` is in clipx."""
    scale = _scale(image)
    trunk = "visual.trunk."
    positioned = vit_layout.default_positions(image)
    layout = vit_layout.layout(image, vit_layout.TIMM, trunk, positioned=positioned, scale=scale)
    given = (image, width, "params/image/projection", _own_head(image))
    if image.pool != "attention":
        return layout + head(*given)
    layout += vit_layout.map_head(image.shape[2], f"{trunk}attn_pool", scale)
    return layout + head(*given, 1 / scale)


def _resnet_rules(image: ResNet, width: int, dropped: int | None) -> list[Rule]:
    layout = resnet_layout.layout(image, "visual.trunk.")
    return layout + head(image, width, "params/image/projection", HEAD)


def _efficientnet_rules(image: EfficientNet, width: int, dropped: int | None) -> list[Rule]:
    layout = efficientnet_layout.layout(image, "timm", "visual.trunk.")
    return layout + head(image, width, "params/image/projection", HEAD)


def _eva_rules(image: EVA, width: int, dropped: int | None) -> list[Rule]:
    layout = eva_layout.layout(image, "visual.trunk.")
    return layout + head(image, width, "params/image/projection", _own_head(image))


def _convnext_rules(image: ConvNeXt, width: int, dropped: int | None) -> list[Rule]:
    layout = convnext_layout.layout(image, "visual.trunk.")
    name = HEAD
    if image.hidden:
        name = "visual.head.mlp.fc2"
        layout += rules.dense("params/image/hidden", "visual.head.mlp.fc1")
    return layout + head(image, width, "params/image/projection", name)


def _vitamin_section(model: Model, folder: str) -> dict[str, Any]:
    name, args = vitamin_layout.architecture(model.image)
    return _timm_section(name, "avg", model, folder if args else "")


def _vitamin_config(model: Model) -> dict[str, Any]:
    name, args = vitamin_layout.architecture(model.image)
    return _config(model, name, args) if args else {}


def _vitamin_rules(image: ViTamin, width: int, dropped: int | None) -> list[Rule]:
    layout = vitamin_layout.layout(image, "visual.trunk.")
    return layout + head(image, width, "params/image/projection", HEAD)


VITAMIN = Layout(_vitamin_section, _vitamin_rules, _vitamin_config)
VIT = Layout(_vit_section, _vit_rules, _vit_config)
EVA_LAYOUT = Layout(_eva_section, _eva_rules, _eva_config)
RESNET = Layout(_resnet_section, _resnet_rules)
EFFICIENTNET = Layout(_efficientnet_section, _efficientnet_rules)
CONVNEXT = Layout(_convnext_section, _convnext_rules, _convnext_config)
