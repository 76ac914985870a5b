"""The lines of a text file, in the encoding and with the line ends that it has."""

from __future__ import annotations

import codecs
import os
import shlex
from collections.abc import Iterator
from typing import BinaryIO

from clipx.config import regular
from clipx.errors import DataError, data_flag

_HEAD = 1 << 16  # bytes from which to tell the encoding and the line ends
_MARKS = (  # the marks of UTF-32 begin with those of UTF-16
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_ZEROS = 0.3  # share of zeros at even or odd places from which a file is UTF-16 without a mark


def lines(path: str) -> Iterator[str]:
    """Yields the lines of a file in UTF-8, UTF-16 or UTF-32, with or without a byte order mark.

    Lines may end with LF, CR LF, or, in a file without any LF, with CR. Raises `DataError` for a
    file that cannot be read or is in another encoding.
    """
    try:
        with open(path, "rb", opener=regular.only) as file:
            head = file.read(_HEAD)
            encoding = _encoding(head)
            if encoding == "utf-8" and (b"\n" in head or b"\r" not in head):
                file.seek(0)
                yield from _utf_8(path, file)
                return
        # `newline`: with "" each of LF, CR and CR LF ends a line, with "\r" CR alone does
        newline = "" if encoding != "utf-8" else "\r"
        encoding = "utf-8-sig" if encoding == "utf-8" else encoding
        with open(path, encoding=encoding, newline=newline, opener=regular.only) as file:
            for line in file:
                yield line[:-1] + "\n" if line.endswith("\r") else line
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not {error.encoding} as its start says ({error.reason} at byte "
            f"{error.start:,}); save it as UTF-8"
        ) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def text(path: str) -> str:
    """The whole text of a file, decoded as `lines` does."""
    return "".join(lines(path))


def marked(data: bytes) -> str:
    """The encoding that a byte order mark at the start of text says; '' without one."""
    return next((name for mark, name in _MARKS if data.startswith(mark)), "")


def _encoding(head: bytes) -> str:
    if name := marked(head):
        return name.removesuffix("-sig")
    pairs = max(len(head) // 2, 1)
    if len(head) >= 8 and head[1::2].count(0) >= _ZEROS * pairs > 4 * head[::2].count(0):
        return "utf-16-le"
    if len(head) >= 8 and head[::2].count(0) >= _ZEROS * pairs > 4 * head[1::2].count(0):
        return "utf-16-be"
    return "utf-8"


def _utf_8(path: str, file: BinaryIO) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            byte = line[error.start]
            kind = "cp1252" if 0x80 <= byte < 0xA0 else "latin1"
            new = os.path.join(os.path.dirname(path), f"utf8-{os.path.basename(path)}")
            raise DataError(
                f"{path}: line {number} is not UTF-8 (byte {byte:#04x}); if it is {kind}, run "
                f"iconv -f {kind} -t utf-8 {shlex.quote(path)} > {shlex.quote(new)} and set "
                f"{data_flag('path', new)}"
            ) from None
