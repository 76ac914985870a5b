"""open_clip's names and layouts: `open_clip_model.safetensors` and `open_clip_config.json`, written
and read (open_clip 3, `model.py`, `transformer.py`, `modified_resnet.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from clipx.errors import ConfigError, NotExpressible
from clipx.interop import base, guests
from clipx.interop.base import Arrays, Model, Rule
from clipx.models.bert import BERT
from clipx.models.resnet import MODIFIED, ResNet
from clipx.models.text import TextTransformer
from clipx.models.vit import ViT
from clipx.ops import photometry

WEIGHTS, CONFIG = "open_clip_model.safetensors", "open_clip_config.json"
_PADDED = "texts whose padding is not attended to, which its config has no word for"


def to_open_clip(model: Model, folder: str = "") -> tuple[Arrays, dict[str, Any]]:
    """The arrays and the config that `open_clip.create_model_and_transforms` makes `model` from.

    folder: where the model will be loaded from, for towers that timm and transformers make for
    open_clip after a file of their own (`guests.config`). Raises `NotExpressible` for towers that
    no config of open_clip describes.
    """
    written = describe(model, folder)  # what has no place is refused before anything is copied
    rules = _rules(model.image, model.text, model.width, model.words.dropped)
    arrays = base.write(rules, model.flat)
    for name in ("logit_scale", "logit_bias"):
        if getattr(model, name) is not None:
            arrays[name] = np.asarray(getattr(model, name), np.float32)
    return arrays, written


def describe(model: Model, folder: str = "") -> dict[str, Any]:
    """The config alone."""
    base.check_widths(model)
    bias = model.logit_bias
    return {
        "model_cfg": {
            "embed_dim": model.width,
            "vision_cfg": _vision_config(model.image, folder),
            "text_cfg": _text_config(model, folder),
            **_activation(model),
            **({} if bias is None else {"init_logit_bias": float(bias)}),
        },
        "preprocess_cfg": {
            "size": [model.image.image_size] * 2,
            "mode": "RGB",
            "mean": list(model.mean),
            "std": list(model.std),
            "interpolation": model.interpolation,
            "resize_mode": model.resize,
        },
    }


def _rules(image, text, width: int, dropped: int | None) -> list[Rule]:
    if isinstance(image, ViT):
        native = image.pool == "class"
        rules = (vit_rules if native else guests.vit_rules)(image, width)
    else:
        rules = (resnet_rules if image.modified else guests.resnet_rules)(image, width)
    if isinstance(text, TextTransformer):
        return rules + text_rules(text, width, dropped)
    return rules + guests.bert_rules(text, width)


def _activation(model: Model) -> dict[str, bool]:
    """One flag for both towers; a ResNet has no such activation."""
    towers = [t for t in (model.image, model.text) if hasattr(t, "activation")]
    if getattr(model.image, "pool", "class") != "class":
        towers.remove(model.image)  # timm's, whose file says its own
    quick = {tower.activation == "quick_gelu" for tower in towers}
    if len(quick) > 1:
        raise NotExpressible(
            "open_clip has QuickGELU for both towers or for none, and here it is one's; "
            "--format=huggingface has an activation for each"
        )
    return {"quick_gelu": True} if quick == {True} else {}


def _own_config(tower) -> dict[str, Any]:
    """What a section says of one tower's norms and activation where they are not the usual."""
    found: dict[str, Any] = {}
    if tower.norm_eps != 1e-5:
        found["norm_kwargs"] = {"eps": tower.norm_eps}
    if tower.activation == "gelu_tanh":
        found["act_kwargs"] = {"approximate": "tanh"}
    return found


def _vision_config(image, folder: str) -> dict[str, Any]:
    if isinstance(image, ViT):
        width, depth, heads, mlp_width, patch = image.shape
        if image.pool != "class":  # open_clip's own always has a class token
            return guests.vision_config(image, folder)
        return {
            "image_size": image.image_size,
            "patch_size": patch,
            "width": width,
            "layers": depth,
            "head_width": width // heads,
            "mlp_ratio": base.ratio(mlp_width, width),
            **({} if image.pre_norm else {"no_ln_pre": True}),
            **_own_config(image),
        }
    if not isinstance(image, ResNet):
        raise NotExpressible(f"open_clip has no image tower like {type(image).__name__}")
    if not image.modified:
        return guests.vision_config(image, folder)
    blocks, width = image.shape
    if len(blocks) != 4:
        raise NotExpressible(
            f"open_clip's modified ResNet has four stages, and this one {len(blocks)}"
        )
    return {
        "image_size": image.image_size,
        "layers": list(blocks),
        "width": width,
        "head_width": width * 32 // image.heads,
        "patch_size": None,
    }


def _text_config(model: Model, folder: str) -> dict[str, Any]:
    text = model.text
    if isinstance(text, BERT):
        return guests.text_config(text, folder)
    if not isinstance(text, TextTransformer):
        raise NotExpressible(f"open_clip has no text tower like {type(text).__name__}")
    base.check_padding(model, own=model.words.plain)
    words = model.words.without_mask()
    pool = _pool(text)
    if pool == "eos" and words.plain:
        pool = "argmax"  # the end mark is the last id, and CLIP's own tokenizer gives it
    return {
        "context_length": text.context,
        "vocab_size": words.vocab_size,
        "width": text.width,
        "heads": text.heads,
        "layers": text.depth,
        "mlp_ratio": base.ratio(round(text.width * text.mlp_ratio), text.width),
        "pool_type": pool,
        **({"pad_id": words.pad_id, "eos_id": words.eot_id} if pool != "argmax" else {}),
        **({} if text.causal else {"no_causal_mask": True}),
        **({"proj_bias": True} if text.embed_dim and text.projection_bias else {}),
        **({} if words.plain else {"hf_tokenizer_name": "."}),  # in a folder: the folder itself
        **_own_config(text),
    }


def _pool(text: TextTransformer) -> str:
    """open_clip's name for where a text is read out."""
    if text.pool == "mean":
        raise NotExpressible("open_clip's text tower has no mean over tokens")
    if not text.causal and text.mask_padding:
        raise NotExpressible(f"open_clip's text tower cannot take {_PADDED}")
    # what follows the end mark changes nothing before it, in a causal tower
    at_end = text.pool == "eot" or text.mask_padding
    return "eos" if at_end else "last"


def vit_rules(image: ViT, width: int) -> list[Rule]:
    ours = "params/image"
    rules = [
        base.conv(f"{ours}/patch_embedding", "visual.conv1"),
        base.same(f"{ours}/class_embedding", "visual.class_embedding"),
        base.same(f"{ours}/positional_embedding", "visual.positional_embedding"),
        *(base.norm(f"{ours}/ln_pre", "visual.ln_pre") if image.pre_norm else ()),
        *base.norm(f"{ours}/ln_post", "visual.ln_post"),
    ]
    _, depth, heads, *_ = image.shape
    rules += block_rules(f"{ours}/transformer", "visual.transformer.resblocks", depth, heads)
    if image.embed_dim:
        return [*rules, base.same(f"{ours}/projection/kernel", "visual.proj")]
    return [*rules, base.constant("visual.proj", base.identity(base.tower_width(image), width))]


def block_rules(ours: str, theirs: str, depth: int, heads: int) -> list[Rule]:
    rules = []
    for i in range(depth):
        a, b = f"{ours}/block_{i}", f"{theirs}.{i}"
        rules += [
            *base.norm(f"{a}/ln_1", f"{b}.ln_1"),
            *base.heads_in((f"{a}/attn/qkv",), (f"{b}.attn.in_proj",), heads, (3,), "_"),
            *base.heads_out(f"{a}/attn/out", f"{b}.attn.out_proj", heads),
            *base.norm(f"{a}/ln_2", f"{b}.ln_2"),
            *base.dense(f"{a}/mlp/fc", f"{b}.mlp.c_fc"),
            *base.dense(f"{a}/mlp/proj", f"{b}.mlp.c_proj"),
        ]
    return rules


def resnet_rules(image: ResNet, width: int) -> list[Rule]:
    rules = []

    def conv_and_norm(ours, theirs, conv, norm):
        rules.append(base.conv(f"params/image/{ours[0]}", f"{theirs}{conv}"))
        rules.extend(base.batch_norm("image", ours[1], f"{theirs}{norm}"))

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
    rules += [
        base.same(f"{ours}/positional_embedding", f"{pool}.positional_embedding"),
        *base.heads_in((f"{ours}/attn/q", f"{ours}/attn/kv"), names, image.heads, (1, 2)),
    ]
    if image.embed_dim:
        return rules + base.dense("params/image/projection", f"{pool}.c_proj")
    return [
        *rules,
        base.constant(f"{pool}.c_proj.weight", base.identity(width, base.tower_width(image))),
        base.constant(f"{pool}.c_proj.bias", lambda: np.zeros(width, np.float32)),
    ]


def text_rules(text: TextTransformer, width: int, dropped: int | None) -> list[Rule]:
    ours = "params/text"
    rules = [
        base.words(f"{ours}/token_embedding", "token_embedding.weight", dropped),
        base.same(f"{ours}/positional_embedding", "positional_embedding"),
        *base.norm(f"{ours}/ln_final", "ln_final"),
        *block_rules(f"{ours}/transformer", "transformer.resblocks", text.depth, text.heads),
    ]
    if not text.embed_dim:
        return [*rules, base.constant("text_projection", base.identity(text.width, width))]
    if text.projection_bias:
        return rules + base.dense(f"{ours}/projection", "text_projection")
    return [*rules, base.same(f"{ours}/projection/kernel", "text_projection")]


# what open_clip's configs may say beside sizes, and the only value that our towers have for it
_ONLY = {
    "ls_init_value": None,
    "attentional_pool": False,
    "pos_embed_type": "learnable",
    "final_ln_after_pool": False,
    "block_type": None,
    **dict.fromkeys(("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner"), False),
    **dict.fromkeys(("scale_attn", "scale_fc", "embed_cls"), False),
    "proj_type": "linear",
}


def from_open_clip(
    arrays: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    guest: Mapping[str, Any] | None = None,
) -> Model:
    """The model of an open_clip folder: its arrays, and its config as JSON has it.

    guest: the `config.json` beside it, of towers that timm and transformers make. Raises
    `ConfigError` for what our towers have not, and for arrays that do not fit the config.
    """
    model, preprocess = config.get("model_cfg", config), config.get("preprocess_cfg", {})
    where = CONFIG
    for section in ("vision_cfg", "text_cfg"):
        for key, value in _ONLY.items():
            found = model.get(section, {}).get(key, value)
            if found not in (value, None, "default"):
                raise ConfigError(
                    f"{where}: {section}.{key}", repr(found), f"{value!r}, all that is read here"
                )
    if "multimodal_cfg" in model:
        raise ConfigError(f"{where}: multimodal_cfg", "a CoCa model", "two towers alone")
    try:
        image, text = _vision_tower(model, guest or {}), _text_tower(model, guest or {})
        width = model["embed_dim"]
    except KeyError as error:
        raise ConfigError(where, f"no {error}", "a config as open_clip writes it") from None
    arrays = dict(arrays)
    if isinstance(text, TextTransformer):
        arrays = {name.removeprefix("text."): x for name, x in arrays.items()}
    rules = _rules(image, text, width, None)
    if model["vision_cfg"].get("timm_proj") == "none":
        rules = [rule for rule in rules if rule.theirs != ("visual.head.proj.weight",)]
    rest = {k: arrays.pop(k) for k in ("logit_scale", "logit_bias") if k in arrays}
    variables = base.read(rules, arrays, WEIGHTS)
    plain = not model["text_cfg"].get("hf_tokenizer_name")
    words = base.Words(
        kind="wordpiece" if isinstance(text, BERT) else "clip_bpe" if plain else "sentencepiece",
        vocab_size=text.vocab_size,
        context=text.context,
        pad_id=text.pad_id,
        sot_id=text.eot_id - 1,
        eot_id=text.eot_id,
        plain=plain,
    )
    return base.same_everywhere(
        base.make_model(
            image,
            text,
            variables,
            logit_scale=np.float32(rest["logit_scale"]).reshape(()),
            logit_bias=np.float32(rest["logit_bias"]).reshape(()) if "logit_bias" in rest else None,
            mean=tuple(preprocess.get("mean", photometry.OPENAI_MEAN)),
            std=tuple(preprocess.get("std", photometry.OPENAI_STD)),
            words=words,
            resize=preprocess.get("resize_mode", "shortest"),
            interpolation=preprocess.get("interpolation", "bicubic"),
        ),
        WEIGHTS,
    )


def _common(model, cfg) -> dict[str, Any]:
    activation = "quick_gelu" if model.get("quick_gelu") else "gelu"
    if kwargs := cfg.get("act_kwargs"):
        if kwargs != {"approximate": "tanh"} or model.get("quick_gelu"):
            raise ConfigError(f"{CONFIG}: act_kwargs", repr(kwargs), "{'approximate': 'tanh'}")
        activation = "gelu_tanh"
    return {
        "embed_dim": model["embed_dim"],
        "activation": activation,
        "norm_eps": (cfg.get("norm_kwargs") or {}).get("eps", 1e-5),
    }


def _vision_tower(model: Mapping[str, Any], guest: Mapping[str, Any]) -> ViT | ResNet:
    cfg = model["vision_cfg"]
    size = cfg.get("image_size", 224)
    size = size if isinstance(size, int) else size[0]
    if cfg.get("timm_model_name"):
        return guests.image_tower(cfg, model["embed_dim"], size, guest, CONFIG)
    layers, width = cfg.get("layers", 12), cfg.get("width", 768)
    if not isinstance(layers, int):
        known = {v: k for k, v in MODIFIED.items()}
        variant = known.get((tuple(layers), width))
        own = {} if variant else {"blocks": tuple(layers), "width": width}
        return ResNet(
            embed_dim=model["embed_dim"], image_size=size, variant=variant or "RN50", **own
        )
    pool = cfg.get("pool_type", "tok")
    if pool != "tok":
        raise ConfigError(f"{CONFIG}: vision_cfg.pool_type", repr(pool), "'tok'")
    heads = width // cfg.get("head_width", 64)
    shape = (width, layers, heads, int(width * cfg.get("mlp_ratio", 4.0)))
    return ViT(
        **base.vit_shape(shape, cfg.get("patch_size", 16)),
        image_size=size,
        pre_norm=not cfg.get("no_ln_pre", False),
        **_common(model, cfg),
    )


def _text_tower(model: Mapping[str, Any], guest: Mapping[str, Any]) -> TextTransformer | BERT:
    cfg = model["text_cfg"]
    if cfg.get("hf_model_name"):
        return guests.text_tower(cfg, model["embed_dim"], guest, CONFIG)
    words, pool = cfg.get("vocab_size", 49408), cfg.get("pool_type", "argmax")
    if pool not in ("argmax", "eos", "last"):
        raise ConfigError(f"{CONFIG}: text_cfg.pool_type", repr(pool), "'argmax', 'eos' or 'last'")
    return TextTransformer(
        vocab_size=words,
        context=cfg.get("context_length", 77),
        width=cfg.get("width", 512),
        depth=cfg.get("layers", 12),
        heads=cfg.get("heads", 8),
        mlp_ratio=cfg.get("mlp_ratio", 4.0),
        causal=not cfg.get("no_causal_mask", False),
        pool="last" if pool == "last" else "eot",
        eot_id=words - 1 if pool == "argmax" else cfg.get("eos_id", 2),
        pad_id=cfg.get("pad_id", 0),
        projection_bias=bool(cfg.get("proj_bias", False)),
        **_common(model, cfg),
    )
