"""open_clip's weights without a config: what the arrays tell, and what they cannot tell.

Sizes follow from the arrays' shapes. The activation, the number of attention heads and the pooling
do not, so a bare file is refused, except OpenAI's own: these are known."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from clipx.errors import ConfigError
from clipx.interop.model import ratio
from clipx.interop.open_clip_layout import CONFIG

# arrays that OpenAI's TorchScript models have beside their weights
_OPENAI = {"input_resolution", "context_length", "vocab_size"}
_UNKNOWN = ("QUICK_GELU", "HEAD_WIDTH", "HEADS")
_NEEDED = {"visual.conv1.weight", "ln_final.weight", "token_embedding.weight"}


def is_openai(arrays: Mapping[str, np.ndarray]) -> bool:
    """Whether the arrays are those of a model that OpenAI has published."""
    return arrays.keys() >= _OPENAI


def config_of(arrays: Mapping[str, np.ndarray], file: str, heads: int | None = None) -> Any:
    """A `model_cfg` for arrays of a model with open_clip's own towers. Sizes follow from the
    arrays' shapes; an attention head has 64 channels and the activation is QuickGELU, as in
    OpenAI's models (open_clip, build_model_from_openai_state_dict).

    file: name of the weights file, for error messages. heads: of both towers, if not OpenAI's.
    Raises `ConfigError`, with an empty `where`, for arrays of another model.
    """
    if not arrays.keys() >= _NEEDED:
        if any(name.startswith("visual.") for name in arrays):
            raise ConfigError(
                "",
                f"{file}, with towers of timm or transformers and no {CONFIG} beside it",
                f"{CONFIG}, which describes those towers",
                f"put the model's own {CONFIG} into {pathlib.Path(file).parent}",
            )
        example = f"an array {min(arrays)}" if arrays else "no arrays"
        expected = "arrays of a CLIP model with open_clip's names or transformers'"
        raise ConfigError("", f"{file} with {example}", expected)
    text_width = arrays["ln_final.weight"].shape[0]
    text_block = "transformer.resblocks.0.mlp.c_fc.weight"
    vocab_size = len(arrays["token_embedding.weight"])
    text = {
        "context_length": len(arrays["positional_embedding"]),
        "vocab_size": vocab_size,
        "width": text_width,
        "heads": heads or max(text_width // 64, 1),
        "layers": _count(arrays, "transformer.resblocks.", 2),
        **_mlp_ratio(arrays, text_block, text_width),
    }
    if "text_projection.weight" in arrays:
        text["proj_bias"] = "text_projection.bias" in arrays
        embed_dim = len(arrays["text_projection.weight"])
    else:
        embed_dim = arrays["text_projection"].shape[1]
    return {
        "embed_dim": embed_dim,
        "quick_gelu": True,
        "vision_cfg": _vision(arrays, heads),
        "text_cfg": text,
    }


def _count(arrays: Mapping[str, np.ndarray], start: str, part: int) -> int:
    return len({name.split(".")[part] for name in arrays if name.startswith(start)})


def _mlp_ratio(arrays: Mapping[str, np.ndarray], name: str, width: int) -> dict[str, float]:
    rows = len(arrays[name]) if name in arrays else 4 * width
    return {} if rows == 4 * width else {"mlp_ratio": ratio(rows, width)}


def _vision(arrays: Mapping[str, np.ndarray], heads: int | None) -> dict[str, Any]:
    if "visual.proj" in arrays:
        width, _, patch, _ = arrays["visual.conv1.weight"].shape
        side = round((len(arrays["visual.positional_embedding"]) - 1) ** 0.5)
        block = "visual.transformer.resblocks.0.mlp.c_fc.weight"
        return {
            "layers": _count(arrays, "visual.transformer.resblocks.", 3),
            "width": width,
            "head_width": width // heads if heads else 64,
            "patch_size": patch,
            "image_size": patch * side,
            **_mlp_ratio(arrays, block, width),
            **({} if "visual.ln_pre.weight" in arrays else {"no_ln_pre": True}),
        }
    side = round((len(arrays["visual.attnpool.positional_embedding"]) - 1) ** 0.5)
    width = len(arrays["visual.layer1.0.conv1.weight"])
    return {
        "layers": [_count(arrays, f"visual.layer{i}.", 2) for i in (1, 2, 3, 4)],
        "width": width,
        "head_width": width * 32 // heads if heads else 64,
        "image_size": 32 * side,
        "patch_size": None,
    }


def no_config(config: Mapping[str, Any], file: str) -> ConfigError:
    """The error for weights without a config, which says what to put beside them.

    config: a `model_cfg` with their sizes.
    """
    shown = json.loads(json.dumps(config))
    shown["quick_gelu"] = shown["vision_cfg"]["head_width"] = shown["text_cfg"]["heads"] = "?"
    text = json.dumps({"model_cfg": shown})
    for name in _UNKNOWN:
        text = text.replace('"?"', name, 1)
    return ConfigError(
        "",
        f"{file}, and no {CONFIG} beside it",
        "a config: the arrays do not tell the activation and the number of attention heads",
        f"write {pathlib.Path(file).parent / CONFIG} with {text}, where QUICK_GELU is true or "
        "false, HEAD_WIDTH the channels of a head of the image tower, and HEADS the heads of the "
        "text tower; or put the name of open_clip's model in front of the file, as in "
        f"ViT-B-32@{file}",
    )
