"""Reads small files that others may have written: regular ones alone, up to a size, and JSON only
in the shape that is expected."""

from __future__ import annotations

import errno
import functools
import json
import os
import pathlib
import types
import typing
import zlib
from typing import Any

from clipx.config import regular

LARGEST = 64 << 20  # bytes, unless the caller says otherwise; the largest tokenizer.json has half
_DEEPEST = 100  # lists and objects within each other; a few functions recurse on them
_LONGEST = 250  # bytes of a file's name
_SHOWN = 60  # characters of a value in a message


def read_bytes(path: str | os.PathLike, most: int = LARGEST) -> bytes:
    """The content of a file. Raises `OSError`, whose `strerror` says why, for what cannot be read,
    is no regular file, or has more than `most` bytes."""
    with open(path, "rb", opener=regular.only) as file:
        data = file.read(most + 1)
    if len(data) > most:
        reason = f"more than {most:,} bytes, which no such file has"
        raise OSError(errno.EFBIG, reason, os.fspath(path))
    return data


def read_text(path: str | os.PathLike, most: int = LARGEST) -> str:
    """The content of a UTF-8 file, without a byte order mark. Raises `OSError` as `read_bytes`, and
    `UnicodeDecodeError`."""
    return read_bytes(path, most).decode("utf-8-sig")


def unpack(data: bytes, most: int = LARGEST) -> bytes:
    """The content of a gzip file or of what `zlib.compress` gave. Raises `ValueError` for other
    data, and for data that unpack to more than `most` bytes, which are not unpacked further."""
    out = b""
    try:
        while data:  # several gzip files after each other are one
            unpacking = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)
            out += unpacking.decompress(data, most + 1 - len(out))
            if len(out) > most:
                raise ValueError(f"it unpacks to more than {most:,} bytes")
            if not unpacking.eof:
                raise ValueError("cut short")
            data = unpacking.unused_data.lstrip(b"\0")
    except zlib.error as error:
        raise ValueError(f"not whole: {error}") from None
    return out


def parse_json(text: str | bytes, shape: Any = Any) -> Any:
    """The JSON value in a text.

    shape: a type that the value must have: of JSON's own types, lists, dicts with keys of str,
    unions, and typed dicts, which may have more keys than their type says. A float may be an int.
    Raises `ValueError` in one line for other texts and other shapes.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"nested more than {_DEEPEST} levels deep") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error.reason} at byte {error.start})") from None
    _check_depth(value)
    return shaped(value, shape)


def shaped(value: Any, shape: Any) -> Any:
    """`value`, which JSON gave. Raises `ValueError` if it has not the `shape`, as `parse_json` has
    it."""
    _check(value, shape, "")
    return value


def read_json(path: str | os.PathLike, shape: Any = Any, most: int = LARGEST) -> Any:
    """The JSON value in a file of at most `most` bytes, of a `shape` as `parse_json` has it. Raises
    `OSError` as `read_bytes`, and `ValueError` in one line."""
    return parse_json(read_bytes(path, most).removeprefix(b"\xef\xbb\xbf"), shape)


def inside(folder: pathlib.Path, name: str) -> pathlib.Path:
    """The file `name` of a folder. Raises `ValueError` for a name that leads out of it, and for one
    that is too long for a file."""
    parts = pathlib.PurePath(name)
    if len(os.fsencode(name)) > _LONGEST:
        raise ValueError(f"a name of {len(name):,} characters: {_shown(name)}")
    if parts.is_absolute() or ".." in parts.parts or "\0" in name:
        raise ValueError(f"the name {_shown(name)} leads out of the folder {folder}")
    return folder / name


def _check_depth(value: Any) -> None:
    """Raises `ValueError` for lists and objects more than `_DEEPEST` levels deep."""
    level = [value]
    for _ in range(_DEEPEST + 1):
        level = [x for x in level if isinstance(x, dict | list)]
        if not level:
            return
        level = [y for x in level for y in (x.values() if isinstance(x, dict) else x)]
    raise ValueError(f"nested more than {_DEEPEST} levels deep")


def _check(value: Any, shape: Any, where: str) -> None:
    if not _fits(value, shape, where):
        at = f"{where.removeprefix('.')} is " if where else ""
        raise ValueError(f"{at}{_shown(value)}, expected {spelled(shape)}")


def _fits(value: Any, shape: Any, where: str) -> bool:
    """Whether a value has a shape. Raises `ValueError` where a part of it does not."""
    origin, args = typing.get_origin(shape), typing.get_args(shape)
    if shape is Any:
        return True
    if origin in (types.UnionType, typing.Union):
        return any(_matches(value, option) for option in args)
    if typing.is_typeddict(shape):
        if not isinstance(value, dict):
            return False
        for key, (kind, required) in _hints(shape).items():
            if key in value:
                _check(value[key], kind, f"{where}.{key}")
            elif required:
                at = f"{where.removeprefix('.')} has" if where else "it has"
                raise ValueError(f"{at} no {key!r}, expected {spelled(shape)}")
        return True
    if origin is list:
        for i, x in enumerate(value if isinstance(value, list) else ()):
            _check(x, args[0], f"{where}[{i}]")
        return isinstance(value, list)
    if origin is dict:
        for key, x in value.items() if isinstance(value, dict) else ():
            _check(x, args[1], f"{where}.{key}")
        return isinstance(value, dict)
    if shape in (None, type(None)):
        return value is None
    if isinstance(value, bool):
        return shape is bool
    return isinstance(value, (int, float) if shape is float else shape)


@functools.cache
def _hints(shape: Any) -> dict[str, tuple[Any, bool]]:
    """(the type of a key, whether it is required) for each key of a typed dict."""
    found = {}
    for key, hint in typing.get_type_hints(shape, include_extras=True).items():
        optional = typing.get_origin(hint) is typing.NotRequired
        hint = typing.get_args(hint)[0] if optional else hint
        found[key] = (hint, key in shape.__required_keys__ and not optional)
    return found


def _matches(value: Any, shape: Any) -> bool:
    try:
        return _fits(value, shape, "")
    except ValueError:
        return False


def spelled(shape: Any) -> str:
    """A shape in JSON's words."""
    origin, args = typing.get_origin(shape), typing.get_args(shape)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(map(spelled, args))
    if typing.is_typeddict(shape):
        needed = {key: hint for key, (hint, required) in _hints(shape).items() if required}
        inner = ", ".join(f'"{key}": {spelled(hint)}' for key, hint in needed.items())
        return f"an object {{{inner}}}" if inner else "an object"
    if origin is list:
        return f"a list of {spelled(args[0])}"
    if origin is dict:
        return "an object" if args[1] is Any else f"an object of {spelled(args[1])}"
    names = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
    names |= {dict: "an object", list: "a list", None: "null", type(None): "null"}
    return names.get(shape, "any value")


def _shown(value: Any) -> str:
    text = json.dumps(value, default=repr)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
