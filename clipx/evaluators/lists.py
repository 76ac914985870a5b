"""Lists of class names and of templates in files, as people keep them."""

from __future__ import annotations

import codecs
import pathlib
from typing import Any

from clipx.config import reading
from clipx.config.unknown import nearest
from clipx.errors import ConfigError, listed


def entries(value: str, where: str, wanted: str) -> tuple[str, ...]:
    """The entries of a file: the lines of a text file that are not empty, or a JSON list.

    value: the path. `path#key` takes the list at `key` of a JSON object, such as CLIP_benchmark's
    files of many data sets. Raises `ConfigError` at `where`, which expects `wanted`, for a file
    without such a list.
    """
    path, key = value, ""
    if "#" in value and not pathlib.Path(value).expanduser().exists():
        path, _, key = value.rpartition("#")
    text = text_of(path, where, wanted)
    parsed = _json(path, text, where, wanted)
    if parsed is None:
        if key:
            fault = f"{path!r}, which is no JSON object"
            raise ConfigError(where, fault, wanted, f"leave #{key} out")
        lines = (line.strip() for line in text.splitlines())
        found = tuple(filter(None, lines))
    else:
        found = _list(parsed, path, key, where)
    if not found:
        raise ConfigError(where, f"no entry in {value!r}", wanted)
    return found


def text_of(path: str, where: str, wanted: str) -> str:
    """The text of a file in UTF-8, or in UTF-16 with a mark, without its mark."""
    try:
        data = reading.read_bytes(pathlib.Path(path).expanduser())
        wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        return data.decode("utf-16" if wide else "utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigError(where, f"{path!r} ({reason})", wanted) from None


def _json(path: str, text: str, where: str, wanted: str) -> Any:
    """The list or the object that a file holds as JSON; None for lines of text.

    A line may begin like JSON, as the template "{} in the wild" does. So only a file whose name
    ends with .json must be JSON.
    """
    named = path.lower().endswith(".json")
    try:
        parsed = reading.parse_json(text)
    except ValueError as error:
        if named:
            raise ConfigError(where, f"{path!r} (not JSON: {error})", wanted) from None
        return None
    return parsed if named or (isinstance(parsed, (list, dict)) and parsed) else None


def _list(parsed: Any, path: str, key: str, where: str) -> tuple[str, ...]:
    """The list of strings in a JSON value. Raises `ConfigError` for any other value."""
    if isinstance(parsed, dict):
        if not key and sorted(parsed) == sorted(map(str, range(len(parsed)))):
            parsed = [parsed[str(label)] for label in range(len(parsed))]  # {"0": "tench", ...}
        elif key or len(parsed) == 1:
            key = key or next(iter(parsed))
            if key not in parsed:
                raise ConfigError(
                    where, f"no {key!r} in {path!r}", _shown(parsed), nearest(key, parsed)
                )
            parsed, path = parsed[key], f"{path}#{key}"
        elif all(isinstance(entry, list) for entry in parsed.values()):
            raise ConfigError(
                where, f"{path!r}, which holds {len(parsed)} lists", _shown(parsed), _fix(path)
            )
        elif all(isinstance(entry, str) for entry in parsed.values()):
            raise ConfigError(
                where,
                f"{path!r}, which maps {len(parsed)} keys to names, such as {next(iter(parsed))!r}",
                "names in the order of the labels",
                f"for names by folder: data.names={path} of this eval",
            )
    elif key:
        raise ConfigError(where, f"a list in {path!r}", "a JSON object", f"leave #{key} out")
    if not isinstance(parsed, list) or not all(isinstance(entry, str) for entry in parsed):
        kind = type(parsed).__name__
        raise ConfigError(where, f"{path!r} holds JSON of type {kind}", "a list of strings")
    return tuple(entry.strip() for entry in parsed)


def _shown(parsed: dict[str, Any]) -> str:
    return f"one of its lists: {listed(list(parsed))}"


def _fix(path: str) -> str:
    return f"name one: {path}#KEY"
