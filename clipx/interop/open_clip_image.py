"""Image towers that open_clip itself implements (open_clip 3, `model.py`, `transformer.py`,
`modified_resnet.py`)."""

from __future__ import annotations

from typing import Any

import numpy as np

from clipx.errors import ConfigError, NotExpressible
from clipx.interop import rules
from clipx.interop.model import Model, check_bias, ratio, vit_shape
from clipx.interop.open_clip_layout import Layout, block_rules, common, norm_and_activation
from clipx.interop.rules import Rule
from clipx.interop.settings import Section
from clipx.models.resnet import MODIFIED, ResNet
from clipx.models.vit import ViT


def _vit_section(model: Model, folder: str) -> dict[str, Any]:
    image = model.image
    width, depth, heads, mlp_width, patch = image.shape
    return {
        "image_size": image.image_size,
        "patch_size": patch,
        "width": width,
        "layers": depth,
        "head_width": width // heads,
        "mlp_ratio": ratio(mlp_width, width),
        **({} if image.pre_norm else {"no_ln_pre": True}),
        **_vit_pool(image, model.width),
        **norm_and_activation(image),
    }


def _vit_pool(image: Any, width: int) -> dict[str, Any]:
    """The entries of a section that say how the tokens of a ViT become one vector."""
    if image.pool == "mean":
        return {"pool_type": "avg", "final_ln_after_pool": image.norm_pooled}
    if image.pool != "query":
        return {}
    if image.backbone_width != width:
        raise NotExpressible(
            f"open_clip's attention pooling is as wide as the shared space, {width}, and this one "
            f"{image.backbone_width}"
        )
    return {
        "attentional_pool": True,
        "attn_pooler_queries": image.pool_queries,
        "attn_pooler_heads": image.pool_heads,
    }


def has(image: ViT) -> bool:
    """Whether open_clip itself has such a ViT, without timm."""
    plain = not image.registers and image.layer_scale is None
    plain = plain and not (image.embed_dim and image.biased_projection)
    return plain and image.has_class and image.pool != "attention"


def _vit_rules(image: ViT, width: int, dropped: int | None) -> list[Rule]:
    ours = "params/image"
    layout = [
        rules.conv(f"{ours}/patch_embedding", "visual.conv1"),
        rules.same(f"{ours}/class_embedding", "visual.class_embedding"),
        rules.same(f"{ours}/positional_embedding", "visual.positional_embedding"),
        *(rules.norm(f"{ours}/ln_pre", "visual.ln_pre") if image.pre_norm else ()),
        *rules.norm(f"{ours}/ln_post", "visual.ln_post"),
        *(_query_pool(image, f"{ours}/pool", "visual.attn_pool") if image.pool == "query" else ()),
    ]
    _, depth, heads, *_ = image.shape
    layout += block_rules(f"{ours}/transformer", "visual.transformer.resblocks", depth, heads)
    check_bias(image, "image")
    if image.embed_dim:
        return [*layout, rules.same(f"{ours}/projection/kernel", "visual.proj")]
    return [*layout, rules.constant("visual.proj", rules.identity(image.backbone_width, width))]


def _query_pool(image: ViT, ours: str, theirs: str) -> list[Rule]:
    """CoCa's attention pooling, torch's MultiheadAttention: its projections are one array where the
    queries are as wide as the tokens."""
    attn, heads = f"{theirs}.attn", image.pool_heads
    both, one = (f"{ours}/attn/q", f"{ours}/attn/kv"), (f"{attn}.in_proj",)
    kernels, bias = rules.heads_in(both, one, heads, (1, 2), "_")
    if image.backbone_width != image.shape[0]:
        names = tuple(f"{attn}.{x}_proj" for x in "qkv")
        kernels = [
            rules.heads_in(both[:1], names[:1], heads, (1,), "_")[0],
            rules.heads_in(both[1:], names[1:], heads, (2,), "_")[0],
        ]
    return [
        rules.same(f"{ours}/queries", f"{theirs}.query"),
        *rules.norm(f"{ours}/ln_q", f"{theirs}.ln_q"),
        *rules.norm(f"{ours}/ln_kv", f"{theirs}.ln_k"),
        *(kernels if isinstance(kernels, list) else [kernels]),
        bias,
        *rules.dense(f"{ours}/out", f"{attn}.out_proj"),
    ]


def _resnet_section(model: Model, folder: str) -> dict[str, Any]:
    image = model.image
    blocks, width = image.shape
    if len(blocks) != 4:
        raise NotExpressible(
            f"open_clip's modified ResNet has four stages, but this one has {len(blocks)}"
        )
    if image.norm_eps != ResNet.norm_eps:
        raise NotExpressible(
            f"open_clip's ResNet has norm_eps={ResNet.norm_eps}, not {image.norm_eps}"
        )
    return {
        "image_size": image.image_size,
        "layers": list(blocks),
        "width": width,
        "head_width": width * 32 // image.heads,
        "patch_size": None,
    }


def _resnet_rules(image: ResNet, width: int, dropped: int | None) -> list[Rule]:
    layout = []

    def conv_and_norm(ours: tuple[str, str], theirs: str, conv: str, norm: str) -> None:
        layout.append(rules.conv(f"params/image/{ours[0]}", f"{theirs}{conv}"))
        layout.extend(rules.batch_norm("image", ours[1], f"{theirs}{norm}"))

    for i in (1, 2, 3):
        conv_and_norm((f"conv{i}", f"bn{i}"), "visual.", f"conv{i}", f"bn{i}")
    blocks, stem = image.shape
    channels = stem
    for stage, count in enumerate(blocks):
        for block in range(count):
            a, b = f"stage_{stage}_{block}", f"visual.layer{stage + 1}.{block}."
            for i in (1, 2, 3):
                conv_and_norm((f"{a}/conv{i}", f"{a}/bn{i}"), b, f"conv{i}", f"bn{i}")
            after = stem * 2**stage * 4
            if channels != after or (stage and not block):
                ours = (f"{a}/conv_shortcut", f"{a}/bn_shortcut")
                conv_and_norm(ours, b, "downsample.0", "downsample.1")
            channels = after
    ours, pool = "params/image/pool", "visual.attnpool"
    names = tuple(f"{pool}.{n}_proj" for n in "qkv")
    layout += [
        rules.same(f"{ours}/positional_embedding", f"{pool}.positional_embedding"),
        *rules.heads_in((f"{ours}/attn/q", f"{ours}/attn/kv"), names, image.heads, (1, 2)),
    ]
    if image.embed_dim:
        return layout + rules.dense("params/image/projection", f"{pool}.c_proj")
    return [
        *layout,
        rules.constant(f"{pool}.c_proj.weight", rules.identity(width, image.backbone_width)),
        rules.constant(f"{pool}.c_proj.bias", lambda: np.zeros(width, np.float32)),
    ]


def image_tower(model: Section, section: Section, size: int) -> ViT | ResNet:
    """The image tower of a `model_cfg` and its `vision_cfg`, for images of `size` pixels. Raises
    `ConfigError` for a tower that clipx does not have."""
    width = section.size("width", 768)
    if isinstance(layers := section.get("layers", 12), list):
        blocks = tuple(layers)
        if len(blocks) != 4 or not all(isinstance(n, int) and 0 < n < 1000 for n in blocks):
            raise ConfigError(section.at("layers"), repr(layers), "four numbers of blocks")
        heads = width * 32 // section.size("head_width", 64)
        for key in ("patch_size", "mlp_ratio"):
            section.get(key)  # which a ResNet does not have
        variant = {v: k for k, v in MODIFIED.items()}.get((blocks, width))
        sizes = {} if variant else {"blocks": blocks, "width": width}
        tower = ResNet(
            embed_dim=model.size("embed_dim"), image_size=size, variant=variant or "RN50", **sizes
        )
        if tower.heads != heads:
            raise ConfigError(section.at("head_width"), f"{heads} heads", f"{tower.heads} heads")
        return tower
    patch, head = section.size("patch_size", 16), section.size("head_width", 64)
    if size < patch:
        found = f"{size} pixels with a patch of {patch}"
        raise ConfigError(section.at("image_size"), found, "at least one patch")
    if width % head:
        found = f"{head} with a width of {width}"
        raise ConfigError(section.at("head_width"), found, "a divisor of the width")
    shape = (
        width,
        section.depth("layers", 12),
        width // head,
        section.mlp_width(width),
    )
    return ViT(
        **vit_shape(shape, patch),
        image_size=size,
        uneven=size % patch != 0,  # which torch's convolution leaves out
        pre_norm=not section.flag("no_ln_pre", False),
        **_pool_fields(model, section),
        **common(model, section),
    )


def _pool_fields(model: Section, section: Section) -> dict[str, Any]:
    """The fields of a `ViT` that say how its tokens become one vector."""
    queries, heads = section.size("attn_pooler_queries", 256), section.size("attn_pooler_heads", 8)
    query = section.one_of("attentional_pool", (False, True), False)  # not a name: two poolers
    after = section.flag("final_ln_after_pool", False)
    known = ("tok",) if query else ("tok", "avg")
    if section.one_of("pool_type", known, "tok") == "avg":
        return {"pool": "mean", "class_token": True, "norm_pooled": after}
    if not query:
        return {}  # the norm of the class token is the same on either side of the pooling
    width = {"pool_width": model.size("embed_dim"), "pool_heads": heads, "pool_queries": queries}
    return {"pool": "query", "class_token": True, **width}


VIT = Layout(_vit_section, _vit_rules, quick_gelu=True)
RESNET = Layout(_resnet_section, _resnet_rules)
