"""Writes the configs of transformers' CLIP and SigLIP classes."""

from __future__ import annotations

from typing import Any

from clipx.errors import NotExpressible
from clipx.interop.huggingface_layout import ACTIVATIONS
from clipx.interop.model import Model
from clipx.interop.preprocessing import RESAMPLE
from clipx.models.base import Tower


def model(exported: Model, kind: str) -> dict[str, Any]:
    """`config.json`. kind: the prefix of transformers' class names, "CLIP" or "Siglip"."""
    image, text, words = exported.image, exported.text, exported.words.without_mask()
    width, depth, heads, mlp_width, patch = image.shape
    vision_config = sizes(width, depth, heads, mlp_width, image) | {
        "model_type": f"{kind.lower()}_vision_model",
        "image_size": image.image_size,
        "patch_size": patch,
        "num_channels": 3,
    }
    mlp_width = round(text.width * text.mlp_ratio)
    text_config = sizes(text.width, text.depth, text.heads, mlp_width, text) | {
        "model_type": f"{kind.lower()}_text_model",
        "vocab_size": words.vocab_size,
        "max_position_embeddings": text.context,
        # CLIP's tokenizer pads with the end mark; no token of a causal tower attends to padding
        "pad_token_id": words.eot_id if words.plain else words.pad_id,
        "bos_token_id": words.sot_id,
        "eos_token_id": words.eot_id,
    }
    if kind == "Siglip":
        text_config["projection_size"] = exported.width
        config: dict[str, Any] = {}
    else:
        for section in (vision_config, text_config):
            section["projection_dim"] = exported.width
        config = {"projection_dim": exported.width}
    return config | {
        "architectures": [f"{kind}Model"],
        "model_type": kind.lower(),
        "dtype": "float32",
        "initializer_factor": 1.0,
        "text_config": text_config,
        "vision_config": vision_config,
    }


def sizes(width: int, depth: int, heads: int, mlp_width: int, tower: Tower) -> dict[str, Any]:
    """The entries that both towers' sections have."""
    return {
        "hidden_size": width,
        "intermediate_size": mlp_width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "hidden_act": ACTIVATIONS[tower.activation],
        "layer_norm_eps": tower.norm_eps,
        "attention_dropout": 0.0,
    }


def preprocessor(model: Model, kind: str) -> dict[str, Any]:
    """`preprocessor_config.json`. For `resize="shortest"` it resizes the shorter side and crops the
    centre, as clipx's evaluations do; otherwise it resizes both sides."""
    if model.resize == "longest":
        raise NotExpressible(
            f"transformers' {kind}ImageProcessor fills no picture up to a square "
            "(config.data.resize=longest); use --format=open_clip"
        )
    size = model.image.image_size
    square, centre = {"height": size, "width": size}, model.resize == "shortest"
    return {
        "image_processor_type": f"{kind}ImageProcessor",
        "processor_class": f"{kind}Processor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size} if centre else square,
        "resample": RESAMPLE[model.interpolation],
        "do_center_crop": centre,
        **({"crop_size": square} if centre else {}),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(model.mean),
        "image_std": list(model.std),
    }
