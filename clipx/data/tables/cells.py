"""What one cell of a table holds: text, a list of texts, or a picture."""

from __future__ import annotations

import ast
import json
import re
from typing import Any

PICTURE_ENDS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
_STARTS = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"P5", b"P6")
NUMBERED = re.compile(r"#\d+$")  # `1000.jpg#0`: the first caption of a picture


def is_picture(cell: Any) -> bool:
    """Whether a cell is an encoded picture, alone or as Hugging Face's {bytes, path}."""
    if isinstance(cell, dict):
        return isinstance(cell.get("bytes"), bytes)
    if not isinstance(cell, bytes):
        return False
    return cell.startswith(_STARTS) or (cell[:4] == b"RIFF" and cell[8:12] == b"WEBP")


def has_picture_end(text: str) -> bool:
    """Whether a path ends like a picture's, with or without the number of a caption after it."""
    return NUMBERED.sub("", text).lower().endswith(PICTURE_ENDS)


def cleaned(text: str) -> str:
    """`text` without NULs and byte order marks, stripped."""
    return text.replace("\0", "").replace("\ufeff", "").strip()


def brief(name: str) -> str:
    """The name of a column on one line, without what is behind 60 characters."""
    name = " ".join(name.split())
    return name if len(name) <= 60 else f"{name[:57]}..."


def strings(cell: Any) -> list[str] | None:
    """The strings in one cell, stripped and without NULs.

    A cell is a string or number, a list of them, or the text of a list, as in csv. Bytes that are
    UTF-8 are text, a section with a text `raw` is that text (Karpathy's sentences), and one with a
    `path` is that path (Hugging Face's pictures). A missing value gives []. None for any other
    type, such as the bytes of a picture.
    """
    if isinstance(cell, str):
        return _of_text(cleaned(cell))
    if cell is None or cell != cell:  # pandas writes NaN for a missing value
        return []
    if isinstance(cell, (int, float)):
        return [str(int(cell)) if isinstance(cell, float) and cell.is_integer() else str(cell)]
    if isinstance(cell, bytes):
        try:
            return None if is_picture(cell) else [cleaned(cell.decode("utf-8"))]
        except UnicodeDecodeError:
            return None
    if isinstance(cell, dict):
        inner = cell.get("raw", cell.get("path"))
        return [cleaned(inner)] if isinstance(inner, str) and not is_picture(cell) else None
    if isinstance(cell, list):
        texts: list[str] = []
        for item in cell:
            inner = strings(item)
            if inner is None:
                return None
            texts += inner
        return texts
    return None


def _of_text(cell: str) -> list[str]:
    """The strings of a list that JSON or Python wrote as text; else the text itself."""
    if cell[:2] in ('["', "['") and cell[-1] == "]":
        for parse in (json.loads, ast.literal_eval):
            try:
                value = parse(cell)
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                continue
            if isinstance(value, list) and all(isinstance(text, str) for text in value):
                return [cleaned(text) for text in value]
    return [cell]
