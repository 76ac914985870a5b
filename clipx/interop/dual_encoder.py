"""transformers' `VisionTextDualEncoderModel`: a vision encoder beside BERT and its kin, each with a
projection without bias (transformers 5, `modeling_vision_text_dual_encoder.py`).

It takes what the encoders call their pooler's output, so a text must be pooled by BERT's pooler."""

from __future__ import annotations

import pathlib
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from clipx.errors import ConfigError, NotExpressible
from clipx.interop import bert_layout, huggingface_configs, rules, vit_layout
from clipx.interop import huggingface_layout as layout
from clipx.interop.encoders import tokenizer
from clipx.interop.model import (
    Model,
    Words,
    array_shapes,
    check_heads,
    check_tokens,
    make_model,
    scalar,
)
from clipx.interop.preprocessing import Preprocessing
from clipx.interop.rules import Arrays, Rule
from clipx.interop.settings import Section, keys
from clipx.models.bert import BERT
from clipx.models.vit import ViT

TYPE = "vision-text-dual-encoder"
_CLIP, _SIGLIP = "clip_vision_model", "siglip_vision_model"
_DINO, _REGISTERS = "dinov2", "dinov2_with_registers"
# keys of a DINOv2's config that change no pooled output
_DINO_HARMLESS = keys(
    "apply_layernorm drop_path_rate layerscale_value out_features out_indices stage_names "
    "reshape_hidden_states use_mask_token"
)
_ELSE = "; use --format=open_clip"


def expresses(text: Any) -> bool:
    """Whether such a text tower is exported to this class, if it can be."""
    return isinstance(text, BERT)


def arrays(model: Model) -> Arrays:
    """The model's arrays. Raises `NotExpressible`."""
    vision, kind = _kinds(model)
    found = rules.write(_rules(model.image, model.text, model.width, vision, kind), model.flat)
    return found | {"logit_scale": np.asarray(model.logit_scale, np.float32)}


def configs(model: Model) -> tuple[dict[str, Any], dict[str, Any]]:
    """(`config.json`, `preprocessor_config.json`). Raises `NotExpressible`."""
    vision, kind = _kinds(model)
    config = {
        "architectures": ["VisionTextDualEncoderModel"],
        "model_type": TYPE,
        "dtype": "float32",
        "projection_dim": model.width,
        "vision_config": _vision_config(model.image, vision),
        "text_config": bert_layout.write_config(model.text, kind),
    }
    processor = {"processor_class": "VisionTextDualEncoderProcessor"}
    return config, huggingface_configs.preprocessor(model, "CLIP") | processor


def read(
    given: Arrays, config: Section, pictures: Preprocessing, settings: Mapping[str, Any]
) -> Model:
    """The model of a folder. settings: of its tokenizer, which tell how long texts are. Raises
    `ConfigError` for an encoder that clipx does not have."""
    width = config.size("projection_dim", 512)
    vision = config.section("vision_config", layout.HARMLESS | _DINO_HARMLESS)
    words = config.section("text_config", layout.HARMLESS | bert_layout.HARMLESS)
    scales = [x for name, x in given.items() if name.endswith(".lambda1")]
    image, image_kind = _vision(vision, width, scales)
    text_kind, pad_id, fields = bert_layout.read_config(words, words.where)
    length = settings.get("model_max_length")
    positions = fields["positions"]
    text = BERT(
        **fields,
        context=min(length, positions) if isinstance(length, int) and length > 2 else positions,
        pad_id=pad_id,
        eot_id=words.whole("sep_token_id", BERT.eot_id),
        embed_dim=width,
    )
    given = dict(given)
    logit_scale = scalar(given, "logit_scale", "")
    variables = rules.read(
        _rules(image, text, width, image_kind, text_kind),
        given,
        lambda: array_shapes(image, text),
        "",
    )
    unknown = (line for section in (config, vision, words) for line in section.unread())
    return make_model(
        image,
        text,
        variables,
        logit_scale=logit_scale,
        logit_bias=None,
        **pictures.fields,
        differences=(*pictures.differences, *unknown),
        words=Words(
            kind="huggingface",
            vocab_size=text.vocab_size,
            context=text.context,
            pad_id=pad_id,
            sot_id=None,
            eot_id=text.eot_id,
            plain=False,
        ),
    )


def image_size(given: Mapping[str, Any]) -> int:
    """Pixels of an image's side, from a `config.json`."""
    return Section(given.get("vision_config") or {}, "vision_config").size("image_size", 224)


def _kinds(model: Model) -> tuple[str, str]:
    """The `model_type`s of both encoders. Raises `NotExpressible`."""
    image, text = model.image, model.text
    check_heads(model)
    if model.logit_bias is not None:
        raise NotExpressible(f"VisionTextDualEncoderModel has no logit bias{_ELSE}")
    if text.pool != "pooler" or text.dense_width:
        how = "a dense layer" if text.dense_width else f"pool={text.pool}"
        raise NotExpressible(
            f"VisionTextDualEncoderModel takes a text's pooler, and this tower has {how}{_ELSE}"
        )
    if type(image) is not ViT:
        raise NotExpressible(f"transformers pools no {type(image).__name__} as clipx does{_ELSE}")
    dino = _REGISTERS if image.registers else _DINO
    kinds = {("class", True): _CLIP, ("class", False): dino, ("attention", False): _SIGLIP}
    kind = kinds.get((image.pool, image.pre_norm))
    if kind != dino:
        check_tokens(image, "VisionTextDualEncoderModel")
    if kind is None:
        with_ = "with" if image.pre_norm else "without"
        raise NotExpressible(
            f"transformers has no vision encoder that pools by {image.pool!r} {with_} a LayerNorm "
            f"before its blocks{_ELSE}"
        )
    return kind, bert_layout.kind_of(text)


def _rules(image: Any, text: Any, width: int, vision: str, kind: str) -> list[Rule]:
    if vision == _CLIP:
        found = layout.clip_vision(image, width)  # its projection included
    else:
        own = layout.siglip_vision(image) if vision == _SIGLIP else _dino(image)
        ours = "params/image/projection"
        found = [*own, *layout.projection(image, ours, "visual_projection", width)]
    found += bert_layout.layout(text, kind, "params/text", "text_model.", text.pad_id)
    return found + layout.projection(text, "params/text/projection", "text_projection", width)


def _vision_config(image: Any, kind: str) -> dict[str, Any]:
    width, depth, heads, mlp_width, patch = image.shape
    sizes = huggingface_configs.sizes(width, depth, heads, mlp_width, image)
    if kind in (_DINO, _REGISTERS):
        del sizes["intermediate_size"], sizes["attention_dropout"]
        sizes |= {"mlp_ratio": _ratio(mlp_width, width), "use_swiglu_ffn": False}
        sizes |= {"num_register_tokens": image.registers} if image.registers else {}
    return sizes | {
        "model_type": kind,
        "image_size": image.image_size,
        "patch_size": patch,
        "num_channels": 3,
    }


def _ratio(mlp_width: int, width: int) -> int:
    if mlp_width % width:
        raise NotExpressible(
            f"transformers' DINOv2 has MLPs of a multiple of its width, and this one {mlp_width} "
            f"at a width of {width}{_ELSE}"
        )
    return mlp_width // width


def _vision(vision: Section, width: int, scales: Collection[np.ndarray]) -> tuple[ViT, str]:
    """(the image tower of a `vision_config`, its `model_type`). scales: of DINOv2's blocks, which a
    tower leaves out if they are 1."""
    kind = vision.one_of("model_type", (_CLIP, _SIGLIP, _DINO, _REGISTERS), None)
    if kind in (_DINO, _REGISTERS):
        registers = vision.size("num_register_tokens", 4) if kind == _REGISTERS else 0
        scale = None if all((x == 1).all() for x in scales) else 1.0
        tower = layout.dino_tower(vision, width)
        return tower.clone(registers=registers, layer_scale=scale), kind
    return layout.vision_tower(vision, width, siglip=kind == _SIGLIP), kind


def _dino(image: ViT) -> list[Rule]:
    """DINOv2's encoder, whose blocks scale what they add: by 1 for a tower that does not."""
    width, depth, *_ = image.shape
    names, prefix = vit_layout.DINO, "vision_model."
    found = vit_layout.layout(image, names, prefix, positioned="with_class")
    mask = f"{prefix}embeddings.mask_token"
    found.append(rules.constant(mask, lambda: np.zeros((1, width), np.float32)))
    if image.layer_scale is None:
        blocks = [f"{prefix}{names.block}.{i}" for i in range(depth)]
        scales = [f"{block}.{name}" for block in blocks for name in (names.scale_1, names.scale_2)]
        found += [rules.constant(scale, lambda: np.ones(width, np.float32)) for scale in scales]
    return found


def tokenizer_fields(
    folder: pathlib.Path, given: Mapping[str, Any], where: str
) -> dict[str, Any] | str:
    """As `Format.tokenizer_fields`, from a folder and its `config.json`."""
    words = Section(given["text_config"], "text_config")
    kind, pad_id, fields = bert_layout.read_config(words, where)
    found, differences = tokenizer.find(
        folder, kind, where, size=fields["vocab_size"], pad_id=pad_id, cleaning="raw", notes=[]
    )
    if differences:
        return differences[0].partition(": ")[2]
    return found.section | {"context": min(found.length, fields["positions"])}


def check_type(given: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is of this class. Raises `ConfigError` for one without its parts."""
    if given.get("model_type") != TYPE:
        return False
    for key in ("vision_config", "text_config"):
        if not isinstance(given.get(key), Mapping):
            raise ConfigError(f"config.json: {key}", "nothing", "the config of an encoder")
    return True
