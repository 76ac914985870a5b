"""The formats that models are written to and read from. A new format is a file and a line here."""

from __future__ import annotations

from clipx.errors import ConfigError
from clipx.interop.base import Format
from clipx.interop.huggingface import HuggingFace
from clipx.interop.onnx import Onnx
from clipx.interop.open_clip import OpenClip

# The first format that recognises a folder or file reads it.
FORMATS: tuple[Format, ...] = (OpenClip(), HuggingFace())
WRITTEN: tuple[Format, ...] = (Onnx(),)  # and not read


def named(name: str, where: str = "--format") -> Format:
    """The format called `name`. Raises `ConfigError` at `where` for an unknown name."""
    known = (*FORMATS, *WRITTEN)
    for format_ in known:
        if format_.name == name:
            return format_
    raise ConfigError(where, repr(name), " or ".join(f.name for f in known))
