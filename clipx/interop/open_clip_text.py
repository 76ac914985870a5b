"""The text tower that open_clip itself implements (open_clip 3, `model.py`, `transformer.py`)."""

from __future__ import annotations

from typing import Any

import numpy as np

from clipx.errors import ConfigError, NotExpressible
from clipx.interop import rules
from clipx.interop.model import Model, check_padding, ratio
from clipx.interop.open_clip_layout import Layout, block_rules, common, norm_and_activation
from clipx.interop.rules import Rule
from clipx.interop.settings import Section
from clipx.models.base import Tower
from clipx.models.text import TextTransformer


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
        **({"embed_cls": True} if text.pool == "class" else {"pool_type": pool}),
        **({"pad_id": words.pad_id, "eos_id": words.eot_id} if pool != "argmax" else {}),
        **({} if text.causal else {"no_causal_mask": True}),
        **({"proj_bias": True} if text.embed_dim and text.projection_bias else {}),
        **({"proj_type": "none"} if _unprojected(text, model.width) else {}),
        **({} if words.plain else {"hf_tokenizer_name": "."}),  # the folder itself
        **norm_and_activation(text),
    }


def _pool(text: Tower) -> str:
    """open_clip's name of the token at which a `TextTransformer` pools a text."""
    if text.pool == "mean":
        raise NotExpressible("open_clip's text tower has no mean over tokens")
    if text.activation == "relu":
        raise NotExpressible("open_clip's text tower has GELUs, but this one has ReLUs")
    if text.pool in ("class", "first"):
        return text.pool
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
        *block_rules(f"{ours}/transformer", "transformer.resblocks", text.depth, text.heads),
    ]
    if text.pool == "class":
        layout[1] = _positions(ours)
        layout.append(rules.same(f"{ours}/class_embedding", "cls_emb"))
    if _unprojected(text, width):
        return layout
    if not text.embed_dim:
        return [*layout, rules.constant("text_projection", rules.identity(text.width, width))]
    if text.projection_bias:
        return layout + rules.dense(f"{ours}/projection", "text_projection")
    return [*layout, rules.same(f"{ours}/projection/kernel", "text_projection")]


def _unprojected(text: Any, width: int) -> bool:
    """Whether the features need no projection to the shared space of `width`."""
    return not text.embed_dim and text.width == width


def _positions(ours: str) -> Rule:
    """The positions of a text with a class token, which is the last one."""

    def out(table: np.ndarray, last: np.ndarray) -> tuple[np.ndarray]:
        return (np.concatenate([table, last[None]]),)

    return Rule(
        (f"{ours}/positional_embedding", f"{ours}/class_position"),
        ("positional_embedding",),
        out,
        lambda table: (table[:-1], table[-1]),
    )


def text_tower(model: Section, section: Section) -> TextTransformer:
    """The text tower of a `model_cfg` and its `text_cfg`. Raises `ConfigError` for a setting that
    clipx does not have."""
    vocab_size = section.size("vocab_size", 49408)
    pool = section.one_of("pool_type", ("argmax", "eos", "first", "last"), "argmax")
    ours: Any = {"first": "first", "last": "last"}.get(pool, "eot")
    section.get("final_ln_after_pool")  # which open_clip's text towers do not read
    if section.flag("embed_cls", False):
        ours = "class"
    fields = common(model, section)
    if section.one_of("proj_type", ("linear", "none"), "linear") == "none":
        fields["embed_dim"] = 0
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
        pool=ours,
        eot_id=vocab_size - 1 if pool == "argmax" else end,
        pad_id=pad,
        projection_bias=section.flag("proj_bias", False) and bool(fields["embed_dim"]),
        **fields,
    )


TEXT = Layout(_text_section, _text_rules, quick_gelu=True)
