"""Towers that open_clip builds through timm (ViTs that it does not have itself, the plain ResNet,
EfficientNet) or through transformers (BERT).

timm builds convolutional networks from their name. The others need a `config.json` in the export.
open_clip's config must give the full path of that folder, because open_clip does not pass its own
folder on to timm and transformers.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from clipx.errors import NotExpressible
from clipx.interop import bert_layout, efficientnet_layout, resnet_layout, rules, vit_layout
from clipx.interop.model import Model, check_bias, ratio
from clipx.interop.open_clip_layout import Layout
from clipx.interop.rules import Rule
from clipx.interop.timm_models import VIT_EPS
from clipx.models.base import Tower
from clipx.models.bert import BERT
from clipx.models.efficientnet import EfficientNet
from clipx.models.resnet import PLAIN, ResNet
from clipx.models.vit import ViT

_POOLS = {"class": "token", "mean": "avg", "attention": "map"}  # ours and timm's


def _timm_section(name: str, pool: str, image: Tower, size: int) -> dict[str, Any]:
    biased = bool(image.embed_dim) and image.biased_projection
    return {
        "image_size": size,
        "timm_model_name": name,
        "timm_model_pretrained": False,
        "timm_pool": pool,
        "timm_proj": "linear",
        **({"timm_proj_bias": True} if biased else {}),
    }


def _vit_section(model: Model, folder: str) -> dict[str, Any]:
    pool = _POOLS[model.image.pool]
    return _timm_section(f"local-dir:{folder}", pool, model.image, model.image.image_size)


def _vit_config(model: Model) -> dict[str, Any]:
    """The content of `config.json` from which timm builds the ViT."""
    image = model.image
    width, depth, heads, mlp_width, patch = image.shape
    more: dict[str, Any] = {}
    if image.registers:
        more = {"reg_tokens": image.registers, "no_embed_class": True}
    if image.layer_scale is not None:
        more["init_values"] = image.layer_scale
    return {
        "architecture": "vit_base_patch16_224",  # `model_args` overrides its sizes
        "num_classes": 0,
        "num_features": width,
        "model_args": {
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
        },
        "pretrained_cfg": {
            "input_size": [3, image.image_size, image.image_size],
            "mean": list(model.mean),
            "std": list(model.std),
            "num_classes": 0,
        },
    }


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
    return _timm_section(name, "avg", image, image.image_size)


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
    return _timm_section(prefix + image.variant, "avg", image, image.image_size)


# our pooling and open_clip's. Its max_pooler leaves out words in place of padding.
POOLERS = {
    "pooler": "cls_pooler",
    "cls": "cls_last_hidden_state_pooler",
    "mean": "mean_pooler",
}


def _bert_section(model: Model, folder: str) -> dict[str, Any]:
    pool, kind = model.text.pool, bert_layout.kind_of(model.text)
    if kind != "bert":
        raise NotExpressible(f"open_clip does not build a {kind} of transformers")
    if pool not in POOLERS:
        raise NotExpressible(f"open_clip cannot pool a text by {pool!r}")
    if model.text.dense_width:
        raise NotExpressible("open_clip has no dense layer between pooling and projection")
    # `normalize` is left out: a projection without bias keeps every cosine
    return {
        "context_length": model.text.context,
        "vocab_size": model.text.vocab_size,
        "hf_model_name": folder,
        "hf_model_pretrained": False,
        "hf_tokenizer_name": ".",
        "hf_proj_type": "linear",
        "hf_pooler_type": POOLERS[pool],
    }


def _bert_config(model: Model) -> dict[str, Any]:
    """The content of `config.json` from which transformers builds BERT."""
    return bert_layout.write_config(model.text, "bert")


def _head(tower: Tower, width: int, ours: str, theirs: str, factor: float = 1.0) -> list[Rule]:
    """The projection to the shared space, with its kernel multiplied by `factor`."""
    if tower.embed_dim:
        kernel, *bias = rules.dense(ours, theirs, bias=tower.biased_projection)
        return [*rules.scaled([kernel], factor), *bias]
    copy = rules.identity(width, tower.backbone_width)
    return [rules.constant(f"{theirs}.weight", lambda: np.float32(factor) * copy())]


def _vit_rules(image: ViT, width: int, dropped: int | None) -> list[Rule]:
    """The rules of timm's ViT. Its LayerNorms always add 1e-6 to the variance. The tokens between
    blocks are therefore scaled so that 1e-6 is the same fraction of their variance as `norm_eps` is
    in clipx."""
    scale = float((VIT_EPS / image.norm_eps) ** 0.5)
    trunk = "visual.trunk."
    positioned = vit_layout.default_positions(image)
    layout = vit_layout.layout(image, vit_layout.TIMM, trunk, positioned=positioned, scale=scale)
    head = (image, width, "params/image/projection", "visual.head.proj")
    if image.pool != "attention":
        return layout + _head(*head)
    layout += vit_layout.map_head(image, f"{trunk}attn_pool", scale)
    return layout + _head(*head, 1 / scale)


def _resnet_rules(image: ResNet, width: int, dropped: int | None) -> list[Rule]:
    layout = resnet_layout.layout(image, "visual.trunk.")
    return layout + _head(image, width, "params/image/projection", "visual.head.proj")


def _efficientnet_rules(image: EfficientNet, width: int, dropped: int | None) -> list[Rule]:
    layout = efficientnet_layout.layout(image, "timm", "visual.trunk.")
    return layout + _head(image, width, "params/image/projection", "visual.head.proj")


def _bert_rules(text: BERT, width: int, dropped: int | None) -> list[Rule]:
    check_bias(text, "text")
    layout = bert_layout.layout(text, "bert", "params/text", "text.transformer.", text.pad_id)
    return layout + _head(text, width, "params/text/projection", "text.proj")


VIT = Layout(_vit_section, _vit_rules, _vit_config)
RESNET = Layout(_resnet_section, _resnet_rules)
EFFICIENTNET = Layout(_efficientnet_section, _efficientnet_rules)
BERT_LAYOUT = Layout(_bert_section, _bert_rules, _bert_config)
