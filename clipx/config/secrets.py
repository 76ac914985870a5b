"""Keeps secrets inside the process: `cut` takes them out of every text that leaves it.

Secrets are the user parts of URLs, what signs a URL in its query, and the values of environment
variables that a config names or whose names say that they are secret. Configs keep `$NAME`;
`expand` puts its value in place where a file is opened, and nowhere else.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TextIO

HIDDEN = "***"
# A scheme's user part: up to the last @ before the path, or, for a password with a slash, from a
# colon that is no port's up to an @. github:// names a repository and a branch in this way.
_USER = re.compile(
    r"(?<!github):///?(?:[^\s/?#'\"<>]*@"
    r"|(?![^\s/:]*:(?::|\d+(?:[/?#\s'\"]|$)))[^\s/:@'\"<>]+:(?:(?!://)[^\s@'\"<>])+@)"
)
_SIGNED = re.compile(
    r"([?&;#](?:[\w.-]*(?:token|signature|secret|passw|pwd|credential|access-?_?key|api-?_?key|auth)"
    r"[\w.-]*|sig|key))=([^\s&;#'\"<>]+)",
    re.IGNORECASE,
)
_SECRET = re.compile(
    r"(?:^|_)(?:token|secret|password|passwd|passphrase|pass|key|apikey|credentials?|auth|login)"
    r"(?:$|_)",
    re.IGNORECASE,
)
_VARIABLE = re.compile(r"\$\{?\w+\}?")  # a password or signature that is not expanded
_LEAST = 4  # characters: what is shorter stands in other words
_LEAST_UNNAMED = 8
_named: set[str] = set()  # variables that a path of this process names


class MissingVariable(LookupError):
    """A path names an environment variable that is not set. `name` is the variable's."""

    def __init__(self, name: str):
        super().__init__(f"the environment variable {name} is not set")
        self.name = name


def expand(path: str) -> str:
    """`path` with ~ and $NAME expanded. Raises `MissingVariable`."""
    for name in re.findall(r"\$\{?(\w+)", path):
        if name not in os.environ:
            raise MissingVariable(name)
        _named.add(name)
    return os.path.expandvars(os.path.expanduser(path))


def cut(text: str) -> str:
    """`text` with `***` in place of the user parts and signatures of its URLs, unless they are
    variables, and with `$NAME` in place of the values of secret variables.

    The value of a variable that a path names stays where it is a path itself, without a secret
    name: a message about a missing file must say which.
    """
    return _cut(text, _values())


def _cut(text: str, secret: Sequence[tuple[str, str]]) -> str:
    """`cut`, with what `_values` gives."""
    for value, name in secret:
        if value in text:
            text = text.replace(value, f"${name}")
    if "://" in text:
        text = _USER.sub(_cut_user, text)
    return _SIGNED.sub(_cut_signed, text) if "=" in text else text


def _cut_user(found: re.Match[str]) -> str:
    user = found[0].lstrip(":/")[:-1]
    return found[0] if _VARIABLE.fullmatch(user.rpartition(":")[2]) else f"://{HIDDEN}@"


def _cut_signed(found: re.Match[str]) -> str:
    return found[0] if _VARIABLE.fullmatch(found[2]) else f"{found[1]}={HIDDEN}"


def cut_all(value: Any) -> Any:
    """A copy of a value as JSON holds it, with every text in it cut."""
    secret = _values()  # once: a vocabulary has tens of thousands of texts

    def each(value: Any) -> Any:
        if isinstance(value, str):
            return _cut(value, secret)
        if isinstance(value, Mapping):
            return {each(k) if isinstance(k, str) else k: each(x) for k, x in value.items()}
        return [each(x) for x in value] if isinstance(value, list | tuple) else value

    return each(value)


def hidden(path: str) -> bool:
    """Whether `cut` has taken something out of a path, so that it opens nothing any more."""
    return f"://{HIDDEN}@" in path or f"={HIDDEN}" in path


def hidden_keys(config: Any, where: str = "config") -> list[str]:
    """The keys of a cut config whose values are not whole."""
    if isinstance(config, str):
        return [where] if hidden(config) else []
    inner = config.items() if isinstance(config, Mapping) else ()
    inner = enumerate(config) if isinstance(config, list) else inner
    return list(dict.fromkeys(x for k, v in inner for x in hidden_keys(v, f"{where}.{k}")))


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Context in which what is printed is cut, exceptions that nobody catches included."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_Guarded(stream) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


class _Guarded:
    """A stream that cuts what is written to it: `print` writes each text in one call."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(cut(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _values() -> list[tuple[str, str]]:
    """(value, name) of each secret variable, longest value first: one may contain another."""
    found = []
    for name, value in os.environ.items():
        named, secret = name in _named, _SECRET.search(name) is not None
        long = len(value) >= (_LEAST if named and secret else _LEAST_UNNAMED)
        path = value.startswith("~") or "/" in value or os.sep in value
        if long and (secret or (named and not path)):
            found.append((value, name))
    return sorted(found, key=lambda pair: -len(pair[0]))
