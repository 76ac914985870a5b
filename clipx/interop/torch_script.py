"""Reads the arrays of a TorchScript archive, such as OpenAI's, without running it: the code in the
archive is not compiled, and its objects are not made."""

from __future__ import annotations

import io
import pathlib
import re
import zipfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from clipx.interop import pickled
from clipx.interop.pickled import Call, Name, PickleError, Stored

_TENSOR = "torch._utils._rebuild_tensor_v2"
_TYPED = "torch.jit._pickle.restore_type_tag"
_DTYPES: dict[str, Any] = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": jnp.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
_MOST = 100_000  # fields of a model's modules
_DEEPEST = 50  # modules within each other
# A class of the archive's code, and the names of its fields that a state dict holds.
_CLASS = re.compile(
    r"^class (\w+)\(Module\):\n  __parameters__ = \[(.*)\]\n  __buffers__ = \[(.*)\]$", re.MULTILINE
)


class Foreign(PickleError):
    """An object that only code of the file can make. `name` is its class."""

    def __init__(self, name: str):
        super().__init__(name)
        self.name = name


class _Array(NamedTuple):
    """An array that is not read yet: a view of the elements of a record."""

    record: str
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def is_archive(file: pathlib.Path) -> bool:
    """Whether the file is a TorchScript model."""
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any(re.search("/code/|/constants.pkl$", name) for name in archive.namelist())


def read(file: pathlib.Path) -> dict[str, np.ndarray]:
    """The parameters and buffers of the model, by the names of its state dict, in their dtypes.

    Raises `Foreign` for a model with an object that its own code would have to make, and
    `ValueError`, `KeyError`, `OSError` or `zipfile.BadZipFile` for a damaged archive.
    """
    with zipfile.ZipFile(file) as archive:
        files = _Files(archive, file.stat().st_size)
        if files.text("byteorder", "little") != "little":
            raise PickleError("numbers in the byte order of another machine")
        model = pickled.Reader().read(io.BytesIO(files.bytes("data.pkl")))
        return _read_records(dict(_arrays(model, files, "", 0)), files)


class _Files:
    """The members of the archive, by their names below its only folder."""

    def __init__(self, archive: zipfile.ZipFile, size: int):
        self._archive = archive
        self._left = pickled.LARGER * size  # bytes that may be unpacked; none is read twice
        self._fields_left = _MOST
        self._root = pickled.main_member(archive).filename.removesuffix("data.pkl")
        self._members = {m.filename: m for m in archive.infolist()}
        self._fields: dict[str, dict[str, list[str]]] = {}

    def bytes(self, name: str) -> bytes:
        """The content of a member. Raises `PickleError` for one that is too large for its file."""
        member = self._members[self._root + name]
        self._left -= member.file_size
        if self._left < 0:
            raise PickleError(f"{name} of {member.file_size:,} bytes when it is unpacked")
        return self._archive.read(member)

    def text(self, name: str, default: str) -> str:
        held = self._root + name in self._members
        return self.bytes(name).decode() if held else default

    def fields(self, path: str, held: int) -> list[str] | None:
        """The parameters and buffers of a class, as the archive's code declares them; None if it
        does not (torch before 1.6). held: how many fields an object of the class has, to be counted
        for a model whose modules contain each other many times over."""
        self._fields_left -= held + 1
        if self._fields_left < 0:
            raise PickleError(f"more than {_MOST:,} fields")
        module, _, name = path.rpartition(".")
        if module not in self._fields:
            code = self.text(f"code/{module.replace('.', '/')}.py", "")
            self._fields[module] = {
                m[1]: re.findall('"([^"]*)"', m[2] + m[3]) for m in _CLASS.finditer(code)
            }
        return self._fields[module].get(name)


def _arrays(module: Any, files: _Files, prefix: str, depth: int) -> Iterator[tuple[str, _Array]]:
    """The arrays of a module and of the modules in it, with their names."""
    if depth > _DEEPEST:
        raise PickleError(f"modules more than {_DEEPEST} levels deep")
    if not isinstance(module, Call) or not module.name.startswith("__torch__."):
        raise PickleError(f"{_named(module)} in place of the model")
    if module.state is None:
        return
    if not isinstance(module.state, dict):  # as its own __setstate__ wants it
        raise Foreign(module.name)
    fields = files.fields(module.name, len(module.state))
    for name, value in module.state.items():
        if not isinstance(value, Call):
            continue
        if value.name.startswith("__torch__."):
            yield from _arrays(value, files, f"{prefix}{name}.", depth + 1)
        elif value.name == _TENSOR and (fields is None or name in fields):
            yield prefix + str(name), _array(value)
        elif value.name != _TYPED and fields is not None and name in fields:
            raise Foreign(value.name)  # such as a quantized tensor


def _array(call: Call) -> _Array:
    """What a call of _rebuild_tensor_v2 describes."""
    stored, offset, shape, strides, *_ = call.arguments
    kind, storage, record, _, size = stored.key if isinstance(stored, Stored) else (None,) * 5
    if kind != "storage" or not isinstance(storage, Name) or not isinstance(record, str):
        raise PickleError("a tensor without stored data")
    dtype = storage.path.removeprefix("torch.")
    numbers = (offset, size, *shape, *strides)
    if len(shape) != len(strides) or not all(type(n) is int and n >= 0 for n in numbers):
        raise PickleError("a tensor whose shape is not made of numbers")
    if dtype not in _DTYPES:
        raise Foreign(storage.path)
    return _Array(record, dtype, offset, shape, strides)


def _read_records(found: dict[str, _Array], files: _Files) -> dict[str, np.ndarray]:
    """The arrays themselves, as views of the records, each of which is read once."""
    records: dict[str, bytes] = {}
    arrays = {}
    for name, array in found.items():
        if array.record not in records:
            records[array.record] = files.bytes(f"data/{array.record}")
        flat = np.frombuffer(records[array.record], np.dtype(_DTYPES[array.dtype]))
        last = array.offset + sum((n - 1) * s for n, s in zip(array.shape, array.strides))
        empty = 0 in array.shape
        if len(array.shape) > 32 or (not empty and last >= flat.size):
            raise PickleError(f"a tensor of {array.shape} in {flat.size} stored numbers")
        start = flat[:0] if empty else flat[array.offset :]
        strides = [s * flat.itemsize for s in array.strides]
        arrays[name] = np.lib.stride_tricks.as_strided(start, array.shape, strides)
    return arrays


def _named(value: Any) -> str:
    return value.name if isinstance(value, Call) else type(value).__name__
