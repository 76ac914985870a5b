"""Reads the arrays of a weights file as people keep it: safetensors or torch, whole or in parts,
inside of a training checkpoint, and with the prefixes of the wrappers that training used."""

from __future__ import annotations

import pathlib
import re
import shlex
import zipfile
from collections.abc import Mapping
from typing import TypedDict

import jax
import numpy as np

from clipx.config import reading
from clipx.errors import ConfigError
from clipx.interop import torch_files
from clipx.interop.base import read_json
from clipx.interop.model import cpu
from clipx.interop.rules import Arrays
from clipx.interop.settings import keys

TORCH = (".pt", ".pth", ".bin", ".ckpt", ".tar")
SUFFIXES = (".safetensors", *TORCH)
# other kinds of weights, by the end of their names
UNREADABLE = {
    ".npz": "NumPy arrays, as big_vision keeps them",
    ".npy": "a NumPy array",
    ".h5": "Keras weights",
    ".hdf5": "Keras weights",
    ".keras": "Keras weights",
    ".msgpack": "Flax weights of transformers",
    ".onnx": "an ONNX graph",
    ".gguf": "weights of llama.cpp",
    ".tflite": "a TFLite graph",
    ".mlpackage": "a Core ML model",
    ".distcp": "a part of a torch distributed checkpoint",
}
_WANTED = "a safetensors or torch file of open_clip or transformers"
# module names that torch.compile, DDP, FSDP, activation checkpoints and DeepSpeed put into names
_WRAPPERS = keys("module _orig_mod _fsdp_wrapped_module _checkpoint_wrapped_module _forward_module")


class _Index(TypedDict, total=False):
    """The JSON file that says in which file each array is."""

    weight_map: dict[str, str]


_PART = re.compile(r"-\d{5}-of-\d{5}$")


def read(file: pathlib.Path, where: str, known: re.Pattern[str] = torch_files.IMAGE) -> Arrays:
    """Every array of a weights file, or of the files that an index (.json) lists, under the names
    that the model itself gives them.

    known: matches some name of every model that is wanted, from its beginning; the first group is
    the name of the module that held the model.

    Raises `ConfigError` at `where` for a file that is incomplete, of another kind, or that holds
    several models.
    """
    if file.suffix == ".json":
        return unwrapped(_parts(file, where, known), file, where, known)
    if _PART.search(file.stem):
        index = sorted(file.parent.glob("*.index.json"))
        fix = f"name {index[0]}" if index else "name the index.json that lists all parts"
        raise ConfigError(where, f"{file}, one part of several", "all parts of the model", fix)
    return unwrapped(_file(file, where, known), file, where, known)


def names(file: pathlib.Path, where: str) -> list[str]:
    """The names of the arrays in a safetensors file, none of which is read. Raises `ConfigError` at
    `where`."""
    import safetensors

    check_content(file, where)
    try:
        with safetensors.safe_open(file, framework="numpy") as opened:
            return list(opened.keys())
    except (OSError, safetensors.SafetensorError) as error:
        raise _incomplete(file, error, where) from None


def _incomplete(file: pathlib.Path, error: Exception, where: str) -> ConfigError:
    found = f"{file} ({' '.join(str(error).split())})"
    return ConfigError(where, found, "a complete safetensors file")


def _file(file: pathlib.Path, where: str, known: re.Pattern[str]) -> Arrays:
    if _is_torch(file, where):
        return torch_files.read(file, where, known)
    import safetensors
    from safetensors.flax import load_file  # reads bfloat16; safetensors.numpy does not

    try:
        with jax.default_device(cpu()):
            return {name: np.asarray(x) for name, x in load_file(file).items()}
    except (OSError, safetensors.SafetensorError) as error:
        raise _incomplete(file, error, where) from None


def check_content(file: pathlib.Path, where: str) -> bytes:
    """The first bytes of a file. Raises `ConfigError` at `where` if it is empty, or stands in for
    the real file: a pointer of Git LFS, or a web page."""
    try:
        with file.open("rb") as opened:
            head = opened.read(512)
    except OSError as error:
        raise ConfigError(where, f"{file} ({error.strerror})", "a file that can be read") from None
    if not head:
        raise ConfigError(where, f"{file}, which is empty", "a complete file", "download it again")
    if head.startswith(b"version https://git-lfs"):
        raise ConfigError(
            where,
            f"{file}, a pointer of Git LFS in place of the file itself",
            "the file that the pointer names",
            f"git -C {shlex.quote(str(file.parent))} lfs pull",
        )
    if head.lstrip()[:1] == b"<":
        found = f"{file}, a web page in place of the file"
        raise ConfigError(where, found, "the file itself", "download it again")
    return head


def _is_torch(file: pathlib.Path, where: str) -> bool:
    """Whether a file is torch's (True) or a safetensors file (False). Its content decides; its
    name does where the content is cut short. Raises `ConfigError` for any other kind."""
    head, other = check_content(file, where), UNREADABLE.get(file.suffix)
    if head.startswith(b"PK") and zipfile.is_zipfile(file):
        names = _members(file, where)
        if any(name.endswith(("/data.pkl", "/constants.pkl")) for name in names):
            return True
        other = UNREADABLE[".npz"] if any(n.endswith(".npy") for n in names) else "a ZIP archive"
    elif head.startswith(b"\x89HDF"):
        other = UNREADABLE[".h5"]
    elif head.startswith(b"\x1f\x8b"):
        other = "a gzip file, to be unpacked first"
    elif head[257:262] == b"ustar":
        other = "a tar archive, to be unpacked first"
    elif head.startswith((b"\x80", b"PK")) and file.suffix != ".safetensors":
        return True
    elif head[8:9] == b"{" or file.suffix == ".safetensors":
        return False
    elif file.suffix in TORCH:
        return True
    raise ConfigError(where, f"{file}, {other or 'no weights file that clipx knows'}", _WANTED)


def _members(file: pathlib.Path, where: str) -> list[str]:
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.namelist()
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError) as error:
        raise ConfigError(where, f"{file} ({error})", "a complete torch file") from None


def _parts(index: pathlib.Path, where: str, known: re.Pattern[str]) -> Arrays:
    """Every array of the files that an index lists."""
    content: _Index = read_json(index, where, _Index) or {}
    if not (parts := content.get("weight_map")):
        fix = f"name the folder {index.parent}"
        raise ConfigError(where, f"{index}, without a weight_map", "an index of weights", fix)
    names = sorted(set(parts.values()))
    try:
        missing = [name for name in names if not reading.inside(index.parent, name).is_file()]
    except ValueError as error:
        expected = "parts in the folder of the index, and no others"
        raise ConfigError(where, f"{index}: {error}", expected) from None
    if missing:
        found = f"no {missing[0]} beside {index.name}, which lists {len(names)} parts"
        raise ConfigError(where, found, f"every part, in {index.parent}", "download that part")
    files = [index.parent / name for name in names]
    arrays = {name: x for file in files for name, x in _file(file, where, known).items()}
    if left := [name for name in parts if name not in arrays]:
        found = f"no {left[0]} in {parts[left[0]]}"
        raise ConfigError(where, found, f"every array that {index.name} lists", "download it again")
    return arrays


def unwrapped(
    arrays: Mapping[str, np.ndarray],
    file: pathlib.Path,
    where: str,
    known: re.Pattern[str] = torch_files.IMAGE,
) -> Arrays:
    """The same arrays under the names that the model itself gives them: without the wrappers of
    training, and without the name of the module that held the model.

    Raises `ConfigError` at `where` for flattened shards, two models, and two arrays of one name.
    """
    plain: Arrays = {}
    for name, x in arrays.items():
        if name.endswith("flat_param"):
            found = f"{file}, with {name}: FSDP's flattened parameters"
            raise ConfigError(where, found, "a full state dict (StateDictType.FULL_STATE_DICT)")
        short = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
        _add(plain, short, x, file, where)
    prefixes = sorted({m[1] for name in plain if (m := known.match(name))})
    if len(prefixes) > 1:
        names = ", ".join(repr(prefix) for prefix in prefixes)
        found = f"{file}, with the arrays of several models, under {names}"
        raise ConfigError(where, found, "one model", "save the arrays of one model alone")
    prefix, bare = prefixes[0] if prefixes else "", {}
    for name, x in plain.items():
        _add(bare, name.removeprefix(prefix), x, file, where)
    return bare


def _add(arrays: Arrays, name: str, x: np.ndarray, file: pathlib.Path, where: str) -> None:
    if name in arrays:
        found = f"{file}, with two arrays that are {name} without the wrappers' names"
        raise ConfigError(where, found, "one array of each name")
    arrays[name] = x
