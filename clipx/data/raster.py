"""The kinds of pictures that clipx decodes, told by their first bytes.

Pillow would try every format that it knows: PostScript starts Ghostscript, and other decoders are
rarely tested. So the first bytes choose the one decoder that sees a picture.
"""

from __future__ import annotations

import io
import re

from PIL import Image

_KINDS = (  # Pillow's name of each format, and how its files start
    ("JPEG", rb"\xff\xd8\xff"),
    ("PNG", rb"\x89PNG\r\n\x1a\n"),
    ("WEBP", rb"RIFF....WEBP"),
    ("GIF", rb"GIF8[79]a"),
    ("BMP", rb"BM"),
    ("TIFF", rb"II\*\0|MM\0\*|II\+\0|MM\0\+"),
    ("PPM", rb"P[1-6f]\s"),
    ("JPEG2000", rb"\xff\x4f\xff\x51|\0\0\0\x0cjP  \r\n\x87\n"),
    ("AVIF", rb"....ftyp(?:avi[fs]|mif1|msf1)"),
)
_START = re.compile(b"|".join(b"(%s)" % start for _, start in _KINDS), re.DOTALL)
_HEAD = 16  # bytes that tell the kind
_OTHERS = (  # what else is found under the names of pictures
    (b"%!PS", "PostScript"),
    (b"\xc5\xd0\xd3\xc6", "PostScript"),
    (b"%PDF", "PDF"),
    (b"\xd7\xcd\xc6\x9a", "a Windows metafile"),
    (b"<", "HTML, XML or SVG"),
    (b"{", "JSON"),
)


def kind(data: bytes) -> str:
    """Pillow's name of a picture's format. Raises `ValueError` for what is none that is read."""
    match = _START.match(data[:_HEAD])
    if match:
        return _KINDS[(match.lastindex or 1) - 1][0]
    head = data[:_HEAD].lstrip()
    what = next((f", which is {name}" for start, name in _OTHERS if head.startswith(start)), "")
    raise ValueError(
        f"it starts with {data[:_HEAD]!r}{what}, expected {', '.join(name for name, _ in _KINDS)}"
    )


def opened(data: bytes) -> Image.Image:
    """The picture, opened by the decoder of its format; its pixels are not decoded yet."""
    return Image.open(io.BytesIO(data), formats=[kind(data)])
