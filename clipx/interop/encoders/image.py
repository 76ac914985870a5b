"""Image encoders in the layouts of timm, torchvision, transformers and `efficientnet_pytorch`."""

from __future__ import annotations

import functools
import pathlib
import re
from collections.abc import Callable

from clipx.errors import ConfigError
from clipx.interop import load, weights
from clipx.interop.base import read_json
from clipx.interop.encoders import bare, timm, transformers
from clipx.interop.encoders.base import Encoder
from clipx.interop.rules import Arrays

CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
# What stands before the names of an encoder's own arrays, such as "module." or "backbone.". The
# first layer tells: no other has one of these names without a number before it.
OWN = re.compile(
    r"((?:[A-Za-z_]+\.)*?)"
    r"(?:_?conv_stem|conv1(?:\.0)?|stem\.0|patch_embed\.(?:proj|backbone\.stem\.conv1)|embedder\.embedder\.convolution"
    r"|embeddings\.patch_embedding(?:s\.projection)?)\.weight$"
)
_EXPECTED = "a folder or weights file of timm, torchvision or transformers"


def describe(path: str, where: str = "config.image.init_from") -> Encoder:
    """The encoder in a folder with a `config.json`, or in a weights file with or without one beside
    it.

    Weights are opened only where no config tells the architecture. Raises `ConfigError` at `where`
    for files that are missing or hold something else, and for settings that clipx does not have.
    Settings that it does not know are among the `differences`.
    """
    file = pathlib.Path(path).expanduser()
    if not file.exists():
        raise ConfigError(where, f"nothing at {file}", _EXPECTED, load.download_hint(path))
    folder = file if file.is_dir() else file.parent
    values = read_json(folder / CONFIG, where)
    if file.is_dir():
        file = _weights(folder, values is not None, where)
    arrays = functools.cache(lambda: weights.read(file, where, OWN))
    try:
        return _described(values, file, arrays, where)
    except ConfigError as error:
        error.where = where if error.where in ("", where) else f"{where}: {error.where}"
        raise


def _described(
    values: dict | None, file: pathlib.Path, arrays: Callable[[], Arrays], where: str
) -> Encoder:
    if values is None:
        return bare.describe(arrays, file, where)
    if timm.describes(values):
        return timm.describe(values, f"{file.parent / CONFIG}", arrays, where)
    if transformers.describes(values):
        return transformers.describe(values, file.parent, arrays, where)
    found = f"{file.parent / CONFIG} without architecture or model_type"
    raise ConfigError(where, found, _EXPECTED)


def _weights(folder: pathlib.Path, configured: bool, where: str) -> pathlib.Path:
    """The weights file of a folder. Without a config it must be the only one."""
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    files = sorted(f for f in folder.iterdir() if f.name.endswith(weights.SUFFIXES))
    if len(files) == 1:
        return files[0]
    listed = ", ".join(sorted(p.name for p in folder.iterdir())[:6]) or "nothing in it"
    fix = f"name the file: {files[0]}" if files else ""
    expected = f"{WEIGHTS[0]} or {WEIGHTS[2]}" if configured else _EXPECTED
    raise ConfigError(where, f"{folder} with {listed}", expected, fix)
