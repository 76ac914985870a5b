"""`Section`: an object of another library's JSON config, which knows what nobody has read."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from typing import Any

from clipx.errors import ConfigError


def keys(words: str) -> frozenset[str]:
    """The words of a string."""
    return frozenset(words.split())


class Section:
    """An object of a foreign config, such as `text_config` in `config.json`.

    Every key is read by one of the methods, or named as harmless, or listed by `unread`: none is
    passed over. Values of another type than expected raise `ConfigError`.

    where: the file, and the object in it, for messages. name: of the object, for `unread`.
    harmless: keys that change no output.
    """

    def __init__(
        self, values: Any, where: str, name: str = "", harmless: Collection[str] = ()
    ) -> None:
        if not isinstance(values, Mapping):
            raise ConfigError(where, _json(values), "a JSON object")
        self.where, self._name = where, name
        self._values, self._known = dict(values), set(harmless)

    def at(self, key: str) -> str:
        """The `where` of an error about `key`."""
        return f"{self.where}.{key}" if self._name else f"{self.where}: {key}"

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def get(self, key: str, default: Any = None) -> Any:
        """The value as it is; `default` for a key that is missing or null."""
        self._known.add(key)
        value = self._values.get(key)
        return default if value is None else value

    def size(self, key: str, default: int | None = None, most: int = 2**24) -> int:
        """A whole number from 1 to `most`."""
        return self.whole(key, default, least=1, most=most)

    def depth(self, key: str, default: int | None = None) -> int:
        """A number of blocks."""
        return self.size(key, default, most=1000)

    def whole(
        self, key: str, default: int | None = None, *, least: int = 0, most: int = 2**24
    ) -> int:
        """A whole number from `least` to `most`."""
        value = self._take(key, default)
        if not _is_number(value) or value != int(value) or not least <= value <= most:
            expected = f"a whole number from {least} to {most}"
            raise ConfigError(self.at(key), self._found(key), expected)
        return int(value)

    def mlp_width(self, width: int) -> int:
        """`int(width * mlp_ratio)`, as torch's models have it."""
        found = width * self.number("mlp_ratio", 4.0)
        if not 1 <= found <= 2**24:
            raise ConfigError(self.at("mlp_ratio"), self._found("mlp_ratio"), "a ratio near 4")
        return int(found)

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number."""
        value = self._take(key, default)
        if not _is_number(value) or value <= 0:
            raise ConfigError(self.at(key), self._found(key), "a number greater than 0")
        return value

    def rate(self, key: str, default: float) -> float:
        """A number from 0 to 1, without 1 itself."""
        value = self._take(key, default)
        if not _is_number(value) or not 0 <= value < 1:
            raise ConfigError(self.at(key), self._found(key), "a number from 0 to below 1")
        return value

    def flag(self, key: str, default: bool, *, null: bool | None = None) -> bool:
        """true or false. null: what null means; by default it is refused."""
        value = self._take(key, default)
        value = null if value is None else value
        if not isinstance(value, bool):
            raise ConfigError(self.at(key), self._found(key), "true or false")
        return value

    def one_of(self, key: str, known: Collection[Any], default: Any) -> Any:
        """One of the `known` values; `default` for a key that is missing or null."""
        value = self.get(key, default)
        if isinstance(value, list | dict) or value not in known:
            raise ConfigError(self.at(key), repr(value), " or ".join(map(repr, known)))
        return value

    def section(self, key: str, harmless: Collection[str] = ()) -> Section:
        """The object under `key`; an empty one if it is missing or null."""
        return Section(self.get(key, {}), self.at(key), key, harmless)

    def unread(self, prefix: str = "settings") -> list[str]:
        """A line for each key that was not read: "prefix.section.key: value, ...". Empty values
        are left out, and steps that are switched off, such as `do_pad`."""
        name = f"{prefix}.{self._name}" if self._name else prefix
        return [
            f"{name}.{key}: {_json(value)} in the model, a setting that clipx does not know"
            for key, value in self._values.items()
            if key not in self._known
            and value not in (None, "", [], {})
            and not (value is False and key.startswith("do_"))
        ]

    def _take(self, key: str, default: Any) -> Any:
        self._known.add(key)
        return self._values.get(key, default)

    def _found(self, key: str) -> str:
        return _json(self._values[key]) if key in self._values else "nothing"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _json(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 80 else text[:77] + "..."
