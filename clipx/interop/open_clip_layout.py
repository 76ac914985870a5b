"""Towers that open_clip itself implements: their config sections, and the names and layouts of
their arrays (open_clip 3, `model.py`, `transformer.py`, `modified_resnet.py`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from clipx.errors import ConfigError, NotExpressible
from clipx.interop import rules
from clipx.interop.model import Model, check_bias, check_padding, ratio, vit_shape
from clipx.interop.rules import Rule
from clipx.interop.settings import Section, keys
from clipx.models.base import Tower
from clipx.models.resnet import MODIFIED, ResNet
from clipx.models.text import TextTransformer
from clipx.models.vit import ViT

CONFIG = "open_clip_config.json"


class Layout(NamedTuple):
    """How open_clip describes and stores one kind of tower."""

    # (model, folder from which the export will be loaded) -> the tower's section of the config.
    # Raises `NotExpressible` for a tower that the section cannot describe.
    section: Callable[[Model, str], dict[str, Any]]
    # (tower, width of the shared space, row that the token embedding leaves out) -> rules
    rules: Callable[[Any, int, int | None], list[Rule]]
    # model -> entries of `config.json`, for a tower that open_clip builds through another library
    guest: Callable[[Model], dict[str, Any]] | None = None
    quick_gelu: bool = False  # whether the config's `quick_gelu` flag applies to this tower


def _norm_and_activation(tower: Tower) -> dict[str, Any]:
    """A section's entries for a norm epsilon or activation other than open_clip's default, for a
    `ViT` or `TextTransformer`."""
    entries: dict[str, Any] = {}
    if tower.norm_eps != 1e-5:
        entries["norm_kwargs"] = {"eps": tower.norm_eps}
    if tower.activation == "gelu_tanh":
        entries["act_kwargs"] = {"approximate": "tanh"}
    return entries


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
        **_norm_and_activation(image),
    }


def has(image: ViT) -> bool:
    """Whether open_clip itself has such a ViT, without timm."""
    return image.pool == "class" and not image.registers and image.layer_scale is None


def _vit_rules(image: ViT, width: int, dropped: int | None) -> list[Rule]:
    ours = "params/image"
    layout = [
        rules.conv(f"{ours}/patch_embedding", "visual.conv1"),
        rules.same(f"{ours}/class_embedding", "visual.class_embedding"),
        rules.same(f"{ours}/positional_embedding", "visual.positional_embedding"),
        *(rules.norm(f"{ours}/ln_pre", "visual.ln_pre") if image.pre_norm else ()),
        *rules.norm(f"{ours}/ln_post", "visual.ln_post"),
    ]
    _, depth, heads, *_ = image.shape
    layout += _block_rules(f"{ours}/transformer", "visual.transformer.resblocks", depth, heads)
    check_bias(image, "image")
    if image.embed_dim:
        return [*layout, rules.same(f"{ours}/projection/kernel", "visual.proj")]
    return [*layout, rules.constant("visual.proj", rules.identity(image.backbone_width, width))]


def _block_rules(ours: str, theirs: str, depth: int, heads: int) -> list[Rule]:
    layout = []
    for i in range(depth):
        a, b = f"{ours}/block_{i}", f"{theirs}.{i}"
        layout += [
            *rules.norm(f"{a}/ln_1", f"{b}.ln_1"),
            *rules.heads_in((f"{a}/attn/qkv",), (f"{b}.attn.in_proj",), heads, (3,), "_"),
            *rules.heads_out(f"{a}/attn/out", f"{b}.attn.out_proj", heads),
            *rules.norm(f"{a}/ln_2", f"{b}.ln_2"),
            *rules.dense(f"{a}/mlp/fc", f"{b}.mlp.c_fc"),
            *rules.dense(f"{a}/mlp/proj", f"{b}.mlp.c_proj"),
        ]
    return layout


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


def _text_section(model: Model, folder: str) -> dict[str, Any]:
    text = model.text
    check_padding(model, own=model.words.plain)
    words = model.words.without_mask()
    pool = _pool(text)
    if pool == "eos" and words.plain:
        pool = "argmax"  # in CLIP's own vocabulary the end mark is the highest id
    return {
        "context_length": text.context,
        "vocab_size": words.vocab_size,
        "width": text.width,
        "heads": text.heads,
        "layers": text.depth,
        "mlp_ratio": ratio(round(text.width * text.mlp_ratio), text.width),
        "pool_type": pool,
        **({"pad_id": words.pad_id, "eos_id": words.eot_id} if pool != "argmax" else {}),
        **({} if text.causal else {"no_causal_mask": True}),
        **({"proj_bias": True} if text.embed_dim and text.projection_bias else {}),
        **({} if words.plain else {"hf_tokenizer_name": "."}),  # the folder itself
        **_norm_and_activation(text),
    }


def _pool(text: Tower) -> str:
    """open_clip's name of the token at which a `TextTransformer` pools a text."""
    if text.pool == "mean":
        raise NotExpressible("open_clip's text tower has no mean over tokens")
    if not text.causal and text.mask_padding:
        raise NotExpressible(
            "open_clip's text tower always attends to padding, but this one masks padding"
        )
    # in a causal tower with masked padding, `last` is the last token before padding: the end mark
    at_end = text.pool == "eot" or text.mask_padding
    return "eos" if at_end else "last"


def _text_rules(text: TextTransformer, width: int, dropped: int | None) -> list[Rule]:
    ours = "params/text"
    layout = [
        rules.words(f"{ours}/token_embedding", "token_embedding.weight", dropped),
        rules.same(f"{ours}/positional_embedding", "positional_embedding"),
        *rules.norm(f"{ours}/ln_final", "ln_final"),
        *_block_rules(f"{ours}/transformer", "transformer.resblocks", text.depth, text.heads),
    ]
    if not text.embed_dim:
        return [*layout, rules.constant("text_projection", rules.identity(text.width, width))]
    if text.projection_bias:
        return layout + rules.dense(f"{ours}/projection", "text_projection")
    return [*layout, rules.same(f"{ours}/projection/kernel", "text_projection")]


VIT = Layout(_vit_section, _vit_rules, quick_gelu=True)
RESNET = Layout(_resnet_section, _resnet_rules)
TEXT = Layout(_text_section, _text_rules, quick_gelu=True)


# keys of a `vision_cfg` or `text_cfg` that change no feature: of training, of the tokenizer (read
# with it), and of shapes that an array tells
HARMLESS = keys(
    "patch_dropout output_tokens timm_model_pretrained timm_drop timm_drop_path "
    "hf_model_pretrained hf_tokenizer_name tokenizer_mode tokenizer_kwargs "
    "attn_pooler_queries attn_pooler_heads"
)
# keys of both sections that change a tower, with the only value that clipx's towers support
_ONLY = {
    "ls_init_value": None,
    "attentional_pool": False,
    "pos_embed_type": "learnable",
    "final_ln_after_pool": False,
    "block_type": "default",
    **dict.fromkeys(("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner"), False),
    **dict.fromkeys(("scale_attn", "scale_fc", "embed_cls"), False),
    "proj_type": "linear",
}


def check_only(section: Section) -> None:
    """Raises `ConfigError` for an open_clip option that clipx's towers do not have."""
    for key, value in _ONLY.items():
        section.one_of(key, (value,), value)


def _common(model: Section, section: Section) -> dict[str, Any]:
    """Fields that `ViT` and `TextTransformer` share. model: a `model_cfg`; section: the tower's."""
    activation = "quick_gelu" if model.flag("quick_gelu", False) else "gelu"
    if kwargs := section.get("act_kwargs"):
        if kwargs != {"approximate": "tanh"} or activation == "quick_gelu":
            raise ConfigError(section.at("act_kwargs"), repr(kwargs), "{'approximate': 'tanh'}")
        activation = "gelu_tanh"
    norm = section.section("norm_kwargs")
    eps = norm.number("eps", 1e-5)
    if unknown := norm.unread():
        raise ConfigError(section.at("norm_kwargs"), unknown[0].split(" in the")[0], "eps alone")
    return {"embed_dim": model.size("embed_dim"), "activation": activation, "norm_eps": eps}


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
    section.one_of("pool_type", ("tok",), "tok")
    patch, head = section.size("patch_size", 16), section.size("head_width", 64)
    if size % patch:
        found = f"{size} pixels with a patch of {patch}"
        raise ConfigError(section.at("image_size"), found, "a multiple of the patch")
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
        pre_norm=not section.flag("no_ln_pre", False),
        **_common(model, section),
    )


def text_tower(model: Section, section: Section) -> TextTransformer:
    """The text tower of a `model_cfg` and its `text_cfg`. Raises `ConfigError` for a setting that
    clipx does not have."""
    vocab_size = section.size("vocab_size", 49408)
    pool = section.one_of("pool_type", ("argmax", "eos", "last"), "argmax")
    width, heads = section.size("width", 512), section.size("heads", 8)
    if width % heads:
        found = f"{heads} heads for a width of {width}"
        raise ConfigError(section.at("heads"), found, "a divisor of the width")
    # a tower that pools at the last token reads neither id; its tokenizer is SigLIP's
    pad, end = section.whole("pad_id", 0), section.whole("eos_id", 1 if pool == "last" else 2)
    return TextTransformer(
        vocab_size=vocab_size,
        context=section.size("context_length", 77),
        width=width,
        depth=section.depth("layers", 12),
        heads=heads,
        mlp_ratio=section.mlp_width(width) / width,
        causal=not section.flag("no_causal_mask", False),
        pool="last" if pool == "last" else "eot",
        eot_id=vocab_size - 1 if pool == "argmax" else end,
        pad_id=pad,
        projection_bias=section.flag("proj_bias", False),
        **_common(model, section),
    )
