"""Reads the arrays of a weights file as people keep it: safetensors or torch, whole or in parts,
inside of a training checkpoint, and with the prefixes of the wrappers that training used."""

from __future__ import annotations

import pathlib
import re
import shlex
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from clipx.errors import ConfigError, MissingLibrary
from clipx.interop import libraries
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
# what stands before the image tower's name, which every CLIP or SigLIP has
_IMAGE = re.compile(r"((?:[^.]+\.)*?)(?:visual|vision_model)\.")
_PART = re.compile(r"-\d{5}-of-\d{5}$")


def read(file: pathlib.Path, where: str, known: re.Pattern[str] = _IMAGE) -> Arrays:
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
        return _torch(file, where, known)
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
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
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


def _parts(index: pathlib.Path, where: str, known: re.Pattern[str]) -> Arrays:
    """Every array of the files that an index lists."""
    parts = (read_json(index, where) or {}).get("weight_map")
    if not isinstance(parts, Mapping) or not parts:
        fix = f"name the folder {index.parent}"
        raise ConfigError(where, f"{index}, without a weight_map", "an index of weights", fix)
    names = sorted(set(map(str, parts.values())))
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        found = f"no {missing[0]} beside {index.name}, which lists {len(names)} parts"
        raise ConfigError(where, found, f"every part, in {index.parent}", "download that part")
    files = [index.parent / name for name in names]
    arrays = {name: x for file in files for name, x in _file(file, where, known).items()}
    if left := [name for name in parts if name not in arrays]:
        found = f"no {left[0]} in {parts[left[0]]}"
        raise ConfigError(where, found, f"every array that {index.name} lists", "download it again")
    return arrays


def _torch(file: pathlib.Path, where: str, known: re.Pattern[str]) -> Arrays:
    """Every array of a torch file: a state dict, a checkpoint of training, or a TorchScript model
    such as OpenAI's. A state dict or checkpoint runs no pickled code (`weights_only`)."""
    try:
        torch = libraries.require("torch")
    except MissingLibrary as error:
        expected = "a safetensors file, or torch installed to read this one"
        raise ConfigError(where, f"{file}, but {error}", expected, "pip install torch") from None
    with libraries.quiet():
        value = _load(torch, file, where)
    state = model_state(value, torch.is_tensor, file, where, known)
    try:
        return {name: x.float().numpy() for name, x in state.items() if torch.is_tensor(x)}
    except Exception as error:  # a quantized, sparse or meta tensor
        found = f"{file} ({libraries.one_line(error)})"
        raise ConfigError(where, found, "dense arrays of numbers") from None


def _load(torch: Any, file: pathlib.Path, where: str) -> Any:
    expected = "a complete torch file that holds only arrays"
    try:
        if _is_script(file):
            return torch.jit.load(file, map_location="cpu").state_dict()
        with torch.serialization.safe_globals(_plain_classes()):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        if name := re.search(r"(?:GLOBAL|class|type) (\S+\.\S+)", str(error)):
            found = f"{file}, with an object of {name[1]}, which only code of the file can make"
            raise ConfigError(where, found, expected, _saved_again(file)) from None
        found = f"{file} ({libraries.one_line(error)})"
        raise ConfigError(where, found, expected) from None


def _plain_classes() -> list[Any]:
    """Classes beside the arrays of many checkpoints that run no code when they are read: numbers
    of NumPy, and the arguments of a command."""
    import argparse

    from numpy.dtypes import Float32DType, Float64DType, Int32DType, Int64DType

    scalar = np.float64(0).__reduce__()[0]  # the function that makes a number of NumPy
    dtypes = [np.dtype, Float32DType, Float64DType, Int32DType, Int64DType]
    return [argparse.Namespace, scalar, (scalar, "numpy.core.multiarray.scalar"), *dtypes]


def _saved_again(file: pathlib.Path, keys: tuple[str, ...] = ()) -> str:
    """The command that saves the weights of a file alone. keys: where they are in it."""
    new = file.parent / "weights.pt"
    picked = "".join(f"[{key!r}]" for key in keys)
    code = (
        f"import torch; x = torch.load({str(file)!r}, map_location='cpu', weights_only=False)"
        f"{picked}; torch.save(x.state_dict() if hasattr(x, 'state_dict') else x, {str(new)!r})"
    )
    return (
        f"save the weights alone, and name {new} (this runs the code in the file, so trust its "
        f"author): python -c {shlex.quote(code)}"
    )


def _is_script(file: pathlib.Path) -> bool:
    """Whether the file is a TorchScript model, which contains code, as OpenAI's files do."""
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any("/code/" in name for name in archive.namelist())


def model_state(
    value: Any,
    is_array: Callable[[Any], bool],
    file: pathlib.Path,
    where: str,
    known: re.Pattern[str] = _IMAGE,
) -> Mapping[str, Any]:
    """The dict of `value`, a checkpoint's nested dicts, that holds a model's arrays. Raises
    `ConfigError` at `where` if there is none, or more than one, such as averaged weights."""

    def paths(tree: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
        if not isinstance(tree, Mapping) or len(path) > 3:
            return []
        if any(is_array(x) and known.match(str(name)) for name, x in tree.items()):
            return [path]
        return [found for key, x in tree.items() for found in paths(x, (*path, key))]

    found = paths(value)
    if len(found) > 1:
        names = ", ".join(".".join(map(str, path)) for path in found)
        fix = _saved_again(file, found[0])
        raise ConfigError(where, f"{file}, with the weights of {names}", "one model", fix)
    if not found:
        keys = ", ".join(map(str, list(value)[:6])) if isinstance(value, Mapping) else type(value)
        found = f"{file}, with {keys or 'nothing'}"
        expected = "arrays of a CLIP or SigLIP model, image tower included"
        raise ConfigError(where, found, expected if known is _IMAGE else "arrays of an encoder")
    for key in found[0]:
        value = value[key]
    return value


def unwrapped(
    arrays: Mapping[str, np.ndarray],
    file: pathlib.Path,
    where: str,
    known: re.Pattern[str] = _IMAGE,
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
