"""Reads the arrays of a torch file: a state dict, a checkpoint of training, or a TorchScript model.
No code of the file is run, and no object of it is made."""

from __future__ import annotations

import contextlib
import pathlib
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from clipx.errors import ConfigError, MissingLibrary
from clipx.interop import libraries, pickled, torch_script
from clipx.interop.rules import Arrays

# what stands before the image tower's name, which every CLIP or SigLIP has
IMAGE = re.compile(r"((?:[^.]+\.)*?)(?:visual|vision_model)\.")


def read(file: pathlib.Path, where: str, known: re.Pattern[str]) -> Arrays:
    """Every array of a torch file: a state dict, a checkpoint of training, or a TorchScript model
    such as OpenAI's. No code of the file is run, and no object of it is made."""
    with _refusing(file, where):
        script = torch_script.read(file) if torch_script.is_archive(file) else None
    if script is not None:
        state = model_state(script, lambda x: isinstance(x, np.ndarray), file, where, known)
        _check_size(sum(x.size for x in state.values()), file, where)
        return {name: np.ascontiguousarray(x, np.float32) for name, x in state.items()}
    try:
        torch = libraries.require("torch")
    except MissingLibrary as error:
        expected = "a safetensors file, or torch installed to read this one"
        raise ConfigError(where, f"{file}, but {error}", expected, "pip install torch") from None
    with _refusing(file, where), libraries.quiet():
        pickled.check_file(file)
        with torch.serialization.safe_globals(_plain_classes()):
            value = torch.load(file, map_location="cpu", weights_only=True)
    state = model_state(value, torch.is_tensor, file, where, known)
    arrays = {name: x for name, x in state.items() if torch.is_tensor(x)}
    _check_size(sum(x.numel() for x in arrays.values()), file, where)
    try:
        return {name: x.float().numpy() for name, x in arrays.items()}
    except Exception as error:  # a quantized, sparse or meta tensor
        found = f"{file} ({libraries.one_line(error)})"
        raise ConfigError(where, found, "dense arrays of numbers") from None


@contextlib.contextmanager
def _refusing(file: pathlib.Path, where: str) -> Iterator[None]:
    """Raises `ConfigError` at `where` for whatever a damaged or foreign file raises inside."""
    expected = "a complete torch file that holds only arrays"
    try:
        yield
    except Exception as error:  # of any kind: torch documents none
        named = re.search(r"(?:GLOBAL|class|type) (\S+\.\S+)", str(error))
        name = error.name if isinstance(error, torch_script.Foreign) else named and named[1]
        if name:
            found = f"{file}, with an object of {name}, which only code of the file can make"
            raise ConfigError(where, found, expected, _saved_again(file)) from None
        found = f"{file} ({libraries.one_line(error) or type(error).__name__})"
        raise ConfigError(where, found, expected) from None


def _check_size(numbers: int, file: pathlib.Path, where: str) -> None:
    """Raises `ConfigError` at `where` for arrays that are views of a few numbers many times over:
    a small file that would take all memory. Tied weights and masks of booleans stay far below."""
    size = file.stat().st_size
    if 4 * numbers > pickled.LARGER * size:
        found = f"{file}, {numbers:,} numbers in {size:,} bytes"
        raise ConfigError(where, found, "arrays that the file itself contains")


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


def model_state(
    value: Any,
    is_array: Callable[[Any], bool],
    file: pathlib.Path,
    where: str,
    known: re.Pattern[str] = IMAGE,
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
        raise ConfigError(where, found, expected if known is IMAGE else "arrays of an encoder")
    for key in found[0]:
        value = value[key]
    return value
