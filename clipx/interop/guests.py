"""Towers that open_clip builds through timm (a ViT without class token, the plain ResNet) or
through transformers (BERT).

timm builds the plain ResNet from its name. The other two need a `config.json` in the export.
open_clip's config must give the full path of that folder, because open_clip does not pass its own
folder on to timm and transformers.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from clipx.errors import NotExpressible
from clipx.interop import bert_layout, rules
from clipx.interop.model import Model, check_bias, ratio
from clipx.interop.open_clip_layout import Layout
from clipx.interop.rules import Rule
from clipx.models.base import Tower
from clipx.models.bert import BERT
from clipx.models.resnet import PLAIN, ResNet
from clipx.models.vit import ViT

TIMM_EPS = 1e-6  # of every LayerNorm that timm's ViT makes from JSON


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
    pool = "map" if model.image.pool == "attention" else "avg"
    return _timm_section(f"local-dir:{folder}", pool, model.image, model.image.image_size)


def _vit_config(model: Model) -> dict[str, Any]:
    """The content of `config.json` from which timm builds the ViT."""
    image = model.image
    width, depth, heads, mlp_width, patch = image.shape
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
            "class_token": False,
            "global_pool": "map" if image.pool == "attention" else "avg",
            "fc_norm": False,
            "pre_norm": image.pre_norm,
            "act_layer": image.activation,
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
    return _timm_section(image.variant, "avg", image, image.image_size)


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
    channels, depth, heads, *_ = image.shape
    scale = float((TIMM_EPS / image.norm_eps) ** 0.5)
    a, b = "params/image", "visual.trunk"
    layout = [
        rules.conv(f"{a}/patch_embedding", f"{b}.patch_embed.proj"),
        _positions(image, channels, f"{a}/positional_embedding", b),
        *(rules.norm(f"{a}/ln_pre", f"{b}.norm_pre") if image.pre_norm else ()),
    ]
    for i in range(depth):
        ours, theirs = f"{a}/transformer/block_{i}", f"{b}.blocks.{i}"
        layout += rules.heads_out(f"{ours}/attn/out", f"{theirs}.attn.proj", heads)
        layout += rules.dense(f"{ours}/mlp/proj", f"{theirs}.mlp.fc2")
    layout = rules.scaled(layout, scale)
    for i in range(depth):
        ours, theirs = f"{a}/transformer/block_{i}", f"{b}.blocks.{i}"
        layout += [
            *rules.norm(f"{ours}/ln_1", f"{theirs}.norm1"),
            *rules.heads_in((f"{ours}/attn/qkv",), (f"{theirs}.attn.qkv",), heads, (3,)),
            *rules.norm(f"{ours}/ln_2", f"{theirs}.norm2"),
            *rules.dense(f"{ours}/mlp/fc", f"{theirs}.mlp.fc1"),
        ]
    layout += rules.norm(f"{a}/ln_post", f"{b}.norm")
    head = (image, width, f"{a}/projection", "visual.head.proj")
    if image.pool == "mean":
        return layout + _head(*head)
    ours, theirs = f"{a}/pool", f"{b}.attn_pool"
    out = rules.dense(f"{ours}/out", f"{theirs}.proj")
    return [
        *layout,
        Rule((f"{ours}/probe",), (f"{theirs}.latent",), lambda x: (x[None],), lambda x: (x[0],)),
        *rules.heads_in((f"{ours}/attn/q",), (f"{theirs}.q",), heads, (1,)),
        *rules.heads_in((f"{ours}/attn/kv",), (f"{theirs}.kv",), heads, (2,)),
        *rules.scaled(out + rules.dense(f"{ours}/mlp/proj", f"{theirs}.mlp.fc2"), scale),
        *rules.norm(f"{ours}/ln", f"{theirs}.norm"),
        *rules.dense(f"{ours}/mlp/fc", f"{theirs}.mlp.fc1"),
        *_head(*head, 1 / scale),
    ]


def _positions(image: ViT, channels: int, ours: str, trunk: str) -> Rule:
    """The rule of the positional embedding and, if no norm follows, of the bias of timm's patch
    embedding. Every patch gets the same bias, so reading adds it to every position."""
    position, bias = f"{trunk}.pos_embed", f"{trunk}.patch_embed.proj.bias"
    if image.pre_norm:
        return Rule((ours,), (position,), lambda x: (x[None],), lambda x: (x[0],))
    return Rule(
        (ours,),
        (position, bias),
        lambda x: (x[None], np.zeros(channels, np.float32)),
        lambda x, bias: (x[0] + bias,),
    )


def _resnet_rules(image: ResNet, width: int, dropped: int | None) -> list[Rule]:
    """The rules of torchvision's ResNet, under timm's names."""
    layout = []

    def conv_and_norm(ours: tuple[str, str], theirs: str, conv: str, norm: str) -> None:
        layout.append(rules.conv(f"params/image/{ours[0]}", f"{theirs}{conv}"))
        layout.extend(rules.batch_norm("image", ours[1], f"{theirs}{norm}"))

    conv_and_norm(("conv1", "bn1"), "visual.trunk.", "conv1", "bn1")
    (blocks, channels), bottleneck = image.shape, PLAIN[image.variant][1]
    for stage, count in enumerate(blocks):
        after = 64 * 2**stage * (4 if bottleneck else 1)
        for block in range(count):
            a, b = f"stage_{stage}_{block}", f"visual.trunk.layer{stage + 1}.{block}."
            for i in range(1, 4 if bottleneck else 3):
                conv_and_norm((f"{a}/conv{i}", f"{a}/bn{i}"), b, f"conv{i}", f"bn{i}")
            if channels != after or (stage and not block):
                ours = (f"{a}/conv_shortcut", f"{a}/bn_shortcut")
                conv_and_norm(ours, b, "downsample.0", "downsample.1")
            channels = after
    return layout + _head(image, width, "params/image/projection", "visual.head.proj")


def _bert_rules(text: BERT, width: int, dropped: int | None) -> list[Rule]:
    check_bias(text, "text")
    layout = bert_layout.layout(text, "bert", "params/text", "text.transformer.", text.pad_id)
    return layout + _head(text, width, "params/text/projection", "text.proj")


VIT = Layout(_vit_section, _vit_rules, _vit_config)
RESNET = Layout(_resnet_section, _resnet_rules)
BERT_LAYOUT = Layout(_bert_section, _bert_rules, _bert_config)
