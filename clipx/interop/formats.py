"""The formats that a model is written to and read from. A new one is a file and a line here."""

from __future__ import annotations

from clipx.errors import ConfigError
from clipx.interop.base import Format
from clipx.interop.huggingface import HuggingFace
from clipx.interop.open_clip import OpenClip

# A folder or file is read by the first format that knows it.
FORMATS: tuple[Format, ...] = (OpenClip(), HuggingFace())


def named(name: str, where: str = "--format") -> Format:
    """The format of that name. Raises `ConfigError` at `where`."""
    for format_ in FORMATS:
        if format_.name == name:
            return format_
    raise ConfigError(where, repr(name), " or ".join(f.name for f in FORMATS))
