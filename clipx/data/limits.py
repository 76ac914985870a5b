"""What one row may hold at most. A row beyond a limit is a bad row; it is never decoded."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Annotated

from clipx.config.ranges import INT, Range
from clipx.errors import BadSample

_BOMB = 178_956_970  # pixels from which on Pillow refuses a picture


@dataclasses.dataclass(frozen=True)
class Limits:
    """`config.data.limits`. They hold for evaluations too."""

    pixels: Annotated[int, Range(1, _BOMB)] = 1 << 26  # of a picture: 200 MB when decoded
    # of a file with a picture or captions, on a disk or inside a shard
    file_bytes: Annotated[int, Range(1, INT - 1)] = 1 << 28
    caption_characters: Annotated[int, Range(1, INT - 1)] = 100_000  # of each caption of a row

    def check_bytes(self, key: str, size: int) -> None:
        """Raises `BadSample` for a file of so many bytes, before it is read."""
        if size > self.file_bytes:
            raise BadSample(key, _beyond("a file of", size, "bytes", "file_bytes", self.file_bytes))

    def check_texts(self, key: str, texts: Iterable[str]) -> None:
        """Raises `BadSample` for captions of which one is too long to tokenise."""
        size, most = max(map(len, texts), default=0), self.caption_characters
        if size > most:
            said = _beyond("a caption of", size, "characters", "caption_characters", most)
            raise BadSample(key, said)

    def check_pixels(self, width: int, height: int) -> None:
        """Raises `ValueError` for a picture of this size."""
        if width * height > self.pixels:
            raise ValueError(
                f"{width} x {height} pixels, expected at most {self.pixels:,} in total "
                "(config.data.limits.pixels); downscale the picture"
            )


USUAL = Limits()


def _beyond(what: str, size: int, unit: str, name: str, most: int) -> str:
    return f"{what} {size:,} {unit}, expected at most {most:,} (config.data.limits.{name})"
