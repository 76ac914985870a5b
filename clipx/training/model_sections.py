"""The sections of a config that describe a model of another library."""

from __future__ import annotations

import dataclasses
from typing import Any

from clipx.config import binding as configs
from clipx.data.text.tokenizer_config import TokenizerConfig
from clipx.data.text.tokenizers import Tokenizer
from clipx.errors import ConfigError
from clipx.interop import tokenizer as files
from clipx.interop.model import Model
from clipx.models.base import Tower


def sections(path: str, model: Model, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The sections of a config that describe a model: objective, data, towers and tokenizer.

    path: of the model, for messages. Raises `ConfigError` if `tokenizer` is None.
    """
    if tokenizer is None:
        said = [x.partition(": ")[2] for x in model.differences if x.startswith("tokenizer:")]
        siglip = f"{files.PIECES} of a {files.SIGLIP} in the folder; "
        siglip *= not said or files.PIECES in said[0]  # others have no use for it
        raise ConfigError(
            "--init_from",
            f"{path}, with a tokenizer that clipx does not have" + "".join(f" ({x})" for x in said),
            f"CLIP's own vocabulary; {siglip}or {files.CLIPX}, which clipx.export writes",
        )
    config = dataclasses.replace(tokenizer.config, context=model.text.context)
    for name in ("vocab_size", "eot_id"):
        if getattr(config, name) != getattr(model.text, name):
            found = f"{getattr(config, name)}, but {getattr(model.text, name)} in {path}"
            raise ConfigError(f"{files.CLIPX}: {name}", found, "the tokenizer of this model")

    def tower(module: Tower) -> dict[str, Any]:
        name = type(module).__module__.rpartition(".")[2]
        return {"name": name} | configs.dump(module, module.from_tokenizer)

    return {
        "objective": {
            "name": "clip" if model.logit_bias is None else "siglip",
            "mean": list(model.mean),
            "std": list(model.std),
        },
        "data": {"resize": model.resize, "interpolation": model.interpolation},
        "image": tower(model.image),
        "text": tower(model.text),
        "tokenizer": dataclasses.asdict(config) | ({} if _needs_path(config) else {"path": ""}),
    }


def _needs_path(config: TokenizerConfig) -> bool:
    """Whether the config describes a vocabulary that only a file has."""
    return bool(config.path) and config.name != "sentencepiece"
