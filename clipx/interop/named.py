"""A weights file with the name of its model: `NAME@FILE`, such as `ViT-B-32@epoch_12.pt`. NAME is
one of open_clip's model configs, or a JSON file in their form."""

from __future__ import annotations

import difflib
import importlib.util
import pathlib
from typing import Any

from clipx.errors import ConfigError, install_hint
from clipx.interop.base import read_json
from clipx.interop.open_clip_layout import CONFIG

# what SigLIP's models see, of which a model config says nothing
_SIGLIP = {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}


def split(path: str) -> tuple[str, str]:
    """(name of the model, path of the file); the name is "" for a path that names none."""
    if pathlib.Path(path).expanduser().exists():
        return "", path
    name, at, file = path.partition("@")
    return (name, file) if at and name and file else ("", path)


def config(name: str, where: str) -> dict[str, Any]:
    """The content of an `open_clip_config.json` for the model `name`. Raises `ConfigError` at
    `where` for an unknown name, and for open_clip's names without open_clip."""
    if name.endswith(".json"):
        found = read_json(pathlib.Path(name).expanduser(), where)
        if found is None:
            raise ConfigError(where, f"nothing at {name}", "a model config of open_clip")
    else:
        found = _known(name, where)
    if "model_cfg" in found:
        return found
    timm = str((found.get("vision_cfg") or {}).get("timm_model_name", ""))
    return {"model_cfg": found, "preprocess_cfg": _SIGLIP if "siglip" in timm else {}}


def note(name: str, given: dict[str, Any]) -> str:
    """What is assumed of the pictures of a model that only its name describes."""
    assumed = "squashed, mean and std 0.5" if given.get("preprocess_cfg") else "CLIP's mean and std"
    return f"preprocessing is what {name}'s models usually have: {assumed}"


def hint(path: str) -> str:
    """What to do about a `path` that is no file, if it is an address or a model's name alone; ""
    for another."""
    if "://" in path:
        return "copy it to a local disk first, and name the copy"
    if path and f"{path.replace('/', '-')}.json" in {file.name for file in _files()}:
        return f"name the weights too: {path}@FILE; clipx downloads none"
    return ""


def _files() -> list[pathlib.Path]:
    """open_clip's model configs; none without open_clip."""
    spec = importlib.util.find_spec("open_clip")  # which imports nothing
    folders = spec.submodule_search_locations if spec else None
    return sorted(pathlib.Path(folders[0]).glob("model_configs/*.json")) if folders else []


def _known(name: str, where: str) -> dict[str, Any]:
    files = {file.stem: file for file in _files()}
    if not files:
        raise ConfigError(
            where,
            f"the model name {name!r}, and no open_clip to look it up in",
            f"open_clip, or the path of a JSON file in place of the name, or {CONFIG} beside the "
            "weights",
            install_hint("interop"),
        )
    plain = name.replace("/", "-")
    if plain not in files:
        near = difflib.get_close_matches(plain, files, n=1, cutoff=0.0)
        fix = f"did you mean {near[0]}?" if near else ""
        raise ConfigError(where, f"the model name {name!r}", "a name of open_clip's models", fix)
    return read_json(files[plain], where)
