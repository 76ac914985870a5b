"""The towers of transformers' `CLIPModel` and `SiglipModel`: names and layouts of their arrays, and
how their configs are read (transformers 5, `modeling_clip.py`, `modeling_siglip.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from clipx.errors import ConfigError
from clipx.interop import rules
from clipx.interop.model import vit_shape
from clipx.interop.rules import Rule
from clipx.models.layers import Tower
from clipx.models.text import TextTransformer
from clipx.models.vit import ViT

CONFIG = "config.json"
ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_tanh": "gelu_pytorch_tanh"}


def tower_rules(
    image: ViT, text: TextTransformer, width: int, dropped: int | None, siglip: bool
) -> list[Rule]:
    """The rules of both towers, for a shared space of `width` channels. dropped: the row that the
    exported token embedding leaves out."""
    return [
        *(_siglip_vision(image) if siglip else _clip_vision(image, width)),
        *_text_rules(text, width, dropped, siglip),
    ]


def _blocks(ours: str, theirs: str, depth: int, heads: int) -> list[Rule]:
    layout = []
    for i in range(depth):
        a, b = f"{ours}/transformer/block_{i}", f"{theirs}.encoder.layers.{i}"
        names = tuple(f"{b}.self_attn.{n}_proj" for n in "qkv")
        layout += [
            *rules.norm(f"{a}/ln_1", f"{b}.layer_norm1"),
            *rules.heads_in((f"{a}/attn/qkv",), names, heads, (3,)),
            *rules.heads_out(f"{a}/attn/out", f"{b}.self_attn.out_proj", heads),
            *rules.norm(f"{a}/ln_2", f"{b}.layer_norm2"),
            *rules.dense(f"{a}/mlp/fc", f"{b}.mlp.fc1"),
            *rules.dense(f"{a}/mlp/proj", f"{b}.mlp.fc2"),
        ]
    return layout


def _clip_vision(image: ViT, width: int) -> list[Rule]:
    a, b = "params/image", "vision_model"
    _, depth, heads, *_ = image.shape
    layout = [
        rules.conv(f"{a}/patch_embedding", f"{b}.embeddings.patch_embedding"),
        rules.same(f"{a}/class_embedding", f"{b}.embeddings.class_embedding"),
        rules.same(f"{a}/positional_embedding", f"{b}.embeddings.position_embedding.weight"),
        *rules.norm(f"{a}/ln_pre", f"{b}.pre_layrnorm"),  # transformers' spelling
        *_blocks(a, b, depth, heads),
        *rules.norm(f"{a}/ln_post", f"{b}.post_layernorm"),
    ]
    return layout + _projection(image, f"{a}/projection", "visual_projection", width)


def _projection(tower: Tower, ours: str, theirs: str, width: int) -> list[Rule]:
    if tower.embed_dim:
        return rules.dense(ours, theirs, bias=False)
    copy = rules.identity(width, tower.backbone_width)
    return [rules.constant(f"{theirs}.weight", copy)]


def _siglip_vision(image: ViT) -> list[Rule]:
    a, b = "params/image", "vision_model"
    width, depth, heads, *_ = image.shape
    pool, head = f"{a}/pool", f"{b}.head"
    # clipx's patch embedding has no bias: every patch gets the same one, so reading adds it to
    # every position, and writing gives zeros
    positions = Rule(
        (f"{a}/positional_embedding",),
        (f"{b}.embeddings.position_embedding.weight", f"{b}.embeddings.patch_embedding.bias"),
        lambda x: (x, np.zeros(width, np.float32)),
        lambda x, bias: (x + bias,),
    )
    pooled = (f"{pool}/attn/q", f"{pool}/attn/kv")
    return [
        rules.conv(f"{a}/patch_embedding", f"{b}.embeddings.patch_embedding"),
        positions,
        *_blocks(a, b, depth, heads),
        *rules.norm(f"{a}/ln_post", f"{b}.post_layernorm"),
        Rule((f"{pool}/probe",), (f"{head}.probe",), lambda x: (x[None],), lambda x: (x[0],)),
        *rules.heads_in(pooled, (f"{head}.attention.in_proj",), heads, (1, 2), "_"),
        *rules.dense(f"{pool}/out", f"{head}.attention.out_proj"),
        *rules.norm(f"{pool}/ln", f"{head}.layernorm"),
        *rules.dense(f"{pool}/mlp/fc", f"{head}.mlp.fc1"),
        *rules.dense(f"{pool}/mlp/proj", f"{head}.mlp.fc2"),
    ]


def _text_rules(text: TextTransformer, width: int, dropped: int | None, siglip: bool) -> list[Rule]:
    a, b = "params/text", "text_model"
    layout = [
        rules.words(f"{a}/token_embedding", f"{b}.embeddings.token_embedding.weight", dropped),
        rules.same(f"{a}/positional_embedding", f"{b}.embeddings.position_embedding.weight"),
        *_blocks(a, b, text.depth, text.heads),
        *rules.norm(f"{a}/ln_final", f"{b}.final_layer_norm"),
    ]
    if not siglip:
        return layout + _projection(text, f"{a}/projection", "text_projection", width)
    if text.embed_dim and text.projection_bias:
        return layout + rules.dense(f"{a}/projection", f"{b}.head")
    no_bias = rules.constant(f"{b}.head.bias", lambda: np.zeros(width, np.float32))
    return [*layout, *_projection(text, f"{a}/projection", f"{b}.head", width), no_bias]


def words_size(words: Mapping[str, Any], *, siglip: bool) -> tuple[int, int]:
    """(vocabulary size, tokens per text) of a `text_config`. A missing key is the default of
    transformers' class."""
    size, context = (32000, 64) if siglip else (49408, 77)
    return words.get("vocab_size") or size, words.get("max_position_embeddings", context)


def towers(
    vision: Mapping[str, Any], words: Mapping[str, Any], config: Mapping[str, Any], siglip: bool
) -> tuple[ViT, TextTransformer]:
    """The towers of a `vision_config` and a `text_config` (`words`), inside of `config`. A missing
    key is the default of transformers' class. Raises `ConfigError` for an activation that clipx
    does not have."""
    act, eps = ("gelu_pytorch_tanh", 1e-6) if siglip else ("quick_gelu", 1e-5)
    known = {theirs: ours for ours, theirs in ACTIVATIONS.items()}
    for name, section in (("vision_config", vision), ("text_config", words)):
        activation = section.get("hidden_act", act)
        if activation not in known:
            raise ConfigError(f"{CONFIG}: {name}.hidden_act", repr(activation), ", ".join(known))

    def common(section: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "activation": known[section.get("hidden_act", act)],
            "norm_eps": section.get("layer_norm_eps", eps),
        }

    width = vision.get("hidden_size", 768)
    shape = (
        width,
        vision.get("num_hidden_layers", 12),
        vision.get("num_attention_heads", 12),
        vision.get("intermediate_size", 3072),
    )
    image = ViT(
        **vit_shape(shape, vision.get("patch_size", 16 if siglip else 32)),
        image_size=vision.get("image_size", 224),
        embed_dim=0 if siglip else config.get("projection_dim", 512),
        pool="attention" if siglip else "class",
        pre_norm=not siglip,
        **common(vision),
    )
    text_width = words.get("hidden_size", 768 if siglip else 512)
    vocabulary, context = words_size(words, siglip=siglip)
    end = words.get("eos_token_id", 49407)
    # CLIP's configs once gave 2, and SigLIP's give CLIP's 49407, whatever the tokenizer's id is
    if end == 2 or end >= vocabulary or (siglip and end == 49407):
        end = 1 if siglip else vocabulary - 1
    text = TextTransformer(
        vocab_size=vocabulary,
        context=context,
        width=text_width,
        depth=words.get("num_hidden_layers", 12),
        heads=words.get("num_attention_heads", 12 if siglip else 8),
        mlp_ratio=words.get("intermediate_size", 3072 if siglip else 2048) / text_width,
        causal=not siglip,
        pool="last" if siglip else "eot",
        eot_id=end,
        pad_id=words.get("pad_token_id", 1) if siglip else 0,
        projection_bias=siglip,
        embed_dim=(words.get("projection_size") or text_width)
        if siglip
        else config.get("projection_dim", 512),
        **common(words),
    )
    return image, text
