"""Hugging Face's names and layouts: a folder of `CLIPModel` or of `SiglipModel`, written and read
(transformers 5, `modeling_clip.py`, `modeling_siglip.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from clipx.errors import ConfigError, NotExpressible
from clipx.interop import base
from clipx.interop.base import Arrays, Model, Rule
from clipx.models.text import TextTransformer
from clipx.models.vit import ViT
from clipx.ops import photometry

WEIGHTS, CONFIG, PREPROCESSOR = "model.safetensors", "config.json", "preprocessor_config.json"
PROCESSOR = "processor_config.json"  # where transformers 5 keeps a preprocessor too
_ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_tanh": "gelu_pytorch_tanh"}
_RESAMPLE = {"bicubic": 3, "bilinear": 2}  # Pillow's numbers
_ELSE = "; --format=open_clip can"


def to_huggingface(model: Model) -> tuple[Arrays, dict[str, Any], dict[str, Any]]:
    """The arrays, the config and the preprocessor's config of `CLIPModel` or, for a picture that is
    pooled by attention, `SiglipModel`.

    Raises `NotExpressible` for what the class has not.
    """
    image, text = model.image, model.text
    if not isinstance(image, ViT):
        raise NotExpressible(f"transformers has no CLIP with a {type(image).__name__}{_ELSE}")
    if not isinstance(text, TextTransformer):
        raise NotExpressible(f"CLIPModel has no text tower like {type(text).__name__}")
    base.check_widths(model)
    siglip = image.pool == "attention"
    (_check_siglip if siglip else _check_clip)(model)
    base.check_padding(model, own=False)
    kind = "Siglip" if siglip else "CLIP"
    words, (width, depth, heads, mlp_width, patch) = model.words.without_mask(), image.shape
    vision_config = _sizes(width, depth, heads, mlp_width, image) | {
        "model_type": f"{kind.lower()}_vision_model",
        "image_size": image.image_size,
        "patch_size": patch,
        "num_channels": 3,
    }
    mlp_width = round(text.width * text.mlp_ratio)
    text_config = _sizes(text.width, text.depth, text.heads, mlp_width, text) | {
        "model_type": f"{kind.lower()}_text_model",
        "vocab_size": words.vocab_size,
        "max_position_embeddings": text.context,
        # in a causal tower padding changes nothing, and CLIP's tokenizer pads with the end mark
        "pad_token_id": words.eot_id if words.plain else words.pad_id,
        "bos_token_id": words.sot_id,
        "eos_token_id": words.eot_id,
    }
    if siglip:
        text_config["projection_size"] = model.width
        config: dict[str, Any] = {}
    else:
        for section in (vision_config, text_config):
            section["projection_dim"] = model.width
        config = {"projection_dim": model.width}
    config |= {
        "architectures": [f"{kind}Model"],
        "model_type": kind.lower(),
        "dtype": "float32",
        "initializer_factor": 1.0,
        "text_config": text_config,
        "vision_config": vision_config,
    }
    arrays = base.write(_rules(model, siglip), model.flat)
    scale = np.asarray(model.logit_scale, np.float32)
    if siglip:
        bias = np.zeros(()) if model.logit_bias is None else model.logit_bias
        arrays["logit_scale"] = scale.reshape(1)
        arrays["logit_bias"] = np.asarray(bias, np.float32).reshape(1)
    else:
        arrays["logit_scale"] = scale
    return arrays, config, _preprocessor(model, kind)


def _sizes(width: int, depth: int, heads: int, mlp_width: int, tower) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": mlp_width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "hidden_act": _ACTIVATIONS[tower.activation],
        "layer_norm_eps": tower.norm_eps,
        "attention_dropout": 0.0,
    }


def _preprocessor(model: Model, kind: str) -> dict[str, Any]:
    """The shorter side to the model's size, then the centre, as in evaluation; or both sides."""
    size = model.image.image_size
    whole, centre = {"height": size, "width": size}, model.resize == "shortest"
    return {
        "image_processor_type": f"{kind}ImageProcessor",
        "processor_class": f"{kind}Processor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size} if centre else whole,
        "resample": _RESAMPLE[model.interpolation],
        "do_center_crop": centre,
        **({"crop_size": whole} if centre else {}),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(model.mean),
        "image_std": list(model.std),
    }


def _refuse(faults: Mapping[str, bool], cls: str) -> None:
    for what, found in faults.items():
        if found:
            raise NotExpressible(f"{cls} has no {what}")


def _check_clip(model: Model) -> None:
    image, text = model.image, model.text
    at_end = text.pool == "eot" or (text.pool == "last" and text.mask_padding)
    other = _ELSE * (text.pool != "mean" and not (text.mask_padding and not text.causal))
    biased = bool(text.embed_dim) and text.projection_bias
    _refuse(
        {
            f"image tower that pools by the mean{_ELSE}": image.pool == "mean",
            f"image tower without a LayerNorm before its blocks{_ELSE}": not image.pre_norm,
            f"text tower in which tokens see those after them{other}": not text.causal,
            f"text tower that is read out anywhere but at its end mark{other}": not at_end,
            f"bias in the text's projection{_ELSE}": biased,
            f"logit bias, which SigLIP's loss learns{_ELSE}": model.logit_bias is not None,
        },
        "CLIPModel",
    )


def _check_siglip(model: Model) -> None:
    image, text = model.image, model.text
    _refuse(
        {
            "projection after the picture's attention pooling (config.image.embed_dim=0 trains "
            f"without one){_ELSE}": bool(image.embed_dim),
            "LayerNorm before the image tower's blocks (config.image.pre_norm=false trains "
            f"without one){_ELSE}": image.pre_norm,
            "text tower that leaves padding out": text.mask_padding,
            f"causal text tower (config.text.causal=false trains another){_ELSE}": text.causal,
            "text tower that is read out anywhere but at its last token": text.pool != "last",
        },
        "SiglipModel",
    )


def _rules(model: Model, siglip: bool) -> list[Rule]:
    image, text, width = model.image, model.text, model.width
    return [
        *(_siglip_vision(image) if siglip else _clip_vision(image, width)),
        *_text(text, width, model.words.dropped, siglip),
    ]


def _blocks(ours: str, theirs: str, depth: int, heads: int) -> list[Rule]:
    rules = []
    for i in range(depth):
        a, b = f"{ours}/transformer/block_{i}", f"{theirs}.encoder.layers.{i}"
        names = tuple(f"{b}.self_attn.{n}_proj" for n in "qkv")
        rules += [
            *base.norm(f"{a}/ln_1", f"{b}.layer_norm1"),
            *base.heads_in((f"{a}/attn/qkv",), names, heads, (3,)),
            *base.heads_out(f"{a}/attn/out", f"{b}.self_attn.out_proj", heads),
            *base.norm(f"{a}/ln_2", f"{b}.layer_norm2"),
            *base.dense(f"{a}/mlp/fc", f"{b}.mlp.fc1"),
            *base.dense(f"{a}/mlp/proj", f"{b}.mlp.fc2"),
        ]
    return rules


def _clip_vision(image: ViT, width: int) -> list[Rule]:
    a, b = "params/image", "vision_model"
    _, depth, heads, *_ = image.shape
    rules = [
        base.conv(f"{a}/patch_embedding", f"{b}.embeddings.patch_embedding"),
        base.same(f"{a}/class_embedding", f"{b}.embeddings.class_embedding"),
        base.same(f"{a}/positional_embedding", f"{b}.embeddings.position_embedding.weight"),
        *base.norm(f"{a}/ln_pre", f"{b}.pre_layrnorm"),  # transformers' spelling
        *_blocks(a, b, depth, heads),
        *base.norm(f"{a}/ln_post", f"{b}.post_layernorm"),
    ]
    return rules + _projection(image, f"{a}/projection", "visual_projection", width)


def _projection(tower, ours: str, theirs: str, width: int) -> list[Rule]:
    if tower.embed_dim:
        return base.dense(ours, theirs, bias=False)
    copy = base.identity(width, base.tower_width(tower))
    return [base.constant(f"{theirs}.weight", copy)]


def _siglip_vision(image: ViT) -> list[Rule]:
    a, b = "params/image", "vision_model"
    width, depth, heads, *_ = image.shape
    pool, head = f"{a}/pool", f"{b}.head"
    # a bias of all patches alike is part of every position
    positions = base.Rule(
        (f"{a}/positional_embedding",),
        (f"{b}.embeddings.position_embedding.weight", f"{b}.embeddings.patch_embedding.bias"),
        lambda x: (x, np.zeros(width, np.float32)),
        lambda x, bias: (x + bias,),
    )
    pooled = (f"{pool}/attn/q", f"{pool}/attn/kv")
    return [
        base.conv(f"{a}/patch_embedding", f"{b}.embeddings.patch_embedding"),
        positions,
        *_blocks(a, b, depth, heads),
        *base.norm(f"{a}/ln_post", f"{b}.post_layernorm"),
        base.Rule((f"{pool}/probe",), (f"{head}.probe",), lambda x: (x[None],), lambda x: (x[0],)),
        *base.heads_in(pooled, (f"{head}.attention.in_proj",), heads, (1, 2), "_"),
        *base.dense(f"{pool}/out", f"{head}.attention.out_proj"),
        *base.norm(f"{pool}/ln", f"{head}.layernorm"),
        *base.dense(f"{pool}/mlp/fc", f"{head}.mlp.fc1"),
        *base.dense(f"{pool}/mlp/proj", f"{head}.mlp.fc2"),
    ]


def _text(text: TextTransformer, width: int, dropped: int | None, siglip: bool) -> list[Rule]:
    a, b = "params/text", "text_model"
    rules = [
        base.words(f"{a}/token_embedding", f"{b}.embeddings.token_embedding.weight", dropped),
        base.same(f"{a}/positional_embedding", f"{b}.embeddings.position_embedding.weight"),
        *_blocks(a, b, text.depth, text.heads),
        *base.norm(f"{a}/ln_final", f"{b}.final_layer_norm"),
    ]
    if not siglip:
        return rules + _projection(text, f"{a}/projection", "text_projection", width)
    if text.embed_dim and text.projection_bias:
        return rules + base.dense(f"{a}/projection", f"{b}.head")
    none = base.constant(f"{b}.head.bias", lambda: np.zeros(width, np.float32))
    return [*rules, *_projection(text, f"{a}/projection", f"{b}.head", width), none]


def from_huggingface(
    arrays: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    preprocessor: Mapping[str, Any] | None = None,
) -> Model:
    """The model of a CLIP or SigLIP folder, its configs as JSON has them.

    Raises `ConfigError` for another architecture, for what our towers have not, and for arrays that
    do not fit the config.
    """
    kind = config.get("model_type")
    if kind not in ("clip", "siglip"):
        raise ConfigError(f"{CONFIG}: model_type", repr(kind), "'clip' or 'siglip'")
    siglip = kind == "siglip"
    vision, words = config.get("vision_config") or {}, config.get("text_config") or {}
    image, text = _towers(vision, words, config, siglip)
    arrays = {
        # old files have a level more
        name.replace("text_model.text_model.", "text_model."): x
        for name, x in arrays.items()
    }
    scalars = {k: arrays.pop(k) for k in ("logit_scale", "logit_bias") if k in arrays}
    seen = preprocessor or {}
    mean, std = ((0.5,) * 3,) * 2 if siglip else (photometry.OPENAI_MEAN, photometry.OPENAI_STD)
    resample = {number: name for name, number in _RESAMPLE.items()}
    pictures = {
        "mean": tuple(seen.get("image_mean", mean)),
        "std": tuple(seen.get("image_std", std)),
        # SigLIP's processor has both sides resized, CLIP's cuts the centre
        "resize": "shortest" if seen.get("do_center_crop", not siglip) else "squash",
        "interpolation": resample.get(seen.get("resample", 3), "bicubic"),
    }
    shell = Model(
        image=image,
        text=text,
        params={},
        batch_stats={},
        logit_scale=np.float32(scalars.get("logit_scale", 0)).reshape(()),
        logit_bias=np.float32(scalars["logit_bias"]).reshape(()) if siglip else None,
        **pictures,
        words=base.Words(
            kind="sentencepiece" if siglip else "clip_bpe",
            vocab_size=text.vocab_size,
            context=text.context,
            pad_id=text.pad_id,
            sot_id=words.get("bos_token_id", None if siglip else text.vocab_size - 2),
            eot_id=text.eot_id,
            plain=not siglip and text.vocab_size == 49408,
        ),
    )
    variables = base.read(_rules(shell, siglip), arrays, WEIGHTS)
    rest = {k: getattr(shell, k) for k in ("logit_scale", "logit_bias", "words")} | pictures
    return base.same_everywhere(base.make_model(image, text, variables, **rest), WEIGHTS)


def words_size(words: Mapping[str, Any], *, siglip: bool) -> tuple[int, int]:
    """Rows of the table of words and tokens of a text, by a `text_config`."""
    size, context = (32000, 64) if siglip else (49408, 77)
    return words.get("vocab_size") or size, words.get("max_position_embeddings", context)


def _towers(vision, words, config, siglip: bool) -> tuple[ViT, TextTransformer]:
    """Both towers by their configs; what a config leaves out is the class's default."""
    act, eps = ("gelu_pytorch_tanh", 1e-6) if siglip else ("quick_gelu", 1e-5)
    known = {theirs: ours for ours, theirs in _ACTIVATIONS.items()}
    for name, section in (("vision_config", vision), ("text_config", words)):
        found = section.get("hidden_act", act)
        if found not in known:
            raise ConfigError(f"{CONFIG}: {name}.hidden_act", repr(found), ", ".join(known))

    def common(section):
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
        **base.vit_shape(shape, vision.get("patch_size", 16 if siglip else 32)),
        image_size=vision.get("image_size", 224),
        embed_dim=0 if siglip else config.get("projection_dim", 512),
        pool="attention" if siglip else "class",
        pre_norm=not siglip,
        **common(vision),
    )
    narrow = words.get("hidden_size", 768 if siglip else 512)
    vocabulary, context = words_size(words, siglip=siglip)
    end = words.get("eos_token_id", 49407)
    # what old configs say whatever the tokenizer, and SigLIP's to this day: CLIP's last id
    if end == 2 or end >= vocabulary or (siglip and end == 49407):
        end = 1 if siglip else vocabulary - 1
    text = TextTransformer(
        vocab_size=vocabulary,
        context=context,
        width=narrow,
        depth=words.get("num_hidden_layers", 12),
        heads=words.get("num_attention_heads", 12 if siglip else 8),
        mlp_ratio=words.get("intermediate_size", 3072 if siglip else 2048) / narrow,
        causal=not siglip,
        pool="last" if siglip else "eot",
        eot_id=end,
        pad_id=words.get("pad_token_id", 1) if siglip else 0,
        projection_bias=siglip,
        embed_dim=(words.get("projection_size") or narrow)
        if siglip
        else config.get("projection_dim", 512),
        **common(words),
    )
    return image, text
