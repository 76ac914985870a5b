"""How a picture of any shape becomes the square that a model sees in evaluation."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

Resize = Literal["shortest", "squash", "longest"]
Interpolation = Literal["bicubic", "bilinear"]


@dataclasses.dataclass(frozen=True)
class Framing:
    """`config.data.resize` and `config.data.interpolation`, under open_clip's names.

    shortest: the shorter side is resized to the square's, then the centre is cut out. squash: both
    sides are. longest: the longer side is, and black fills the rest.
    """

    resize: Resize = "shortest"
    interpolation: Interpolation = "bicubic"

    @classmethod
    def of(cls, section: Mapping[str, Any]) -> Framing:
        """That of a config's section `data`."""
        return cls(*(section.get(f.name, f.default) for f in dataclasses.fields(cls)))

    def box(self, width: int, height: int, side: int) -> tuple[int, int, int, int]:
        """(width and height of the resized picture, left and top of the square in it)."""
        if self.resize == "squash":
            return side, side, 0, 0
        if self.resize == "longest":
            ratio = max(width, height) / side
            width, height = max(round(width / ratio), 1), max(round(height / ratio), 1)
            return width, height, -((side - width) // 2), -((side - height) // 2)
        if min(width, height) != side:
            if width <= height:
                width, height = side, int(side * height / width)
            else:
                width, height = int(side * width / height), side
        return width, height, round((width - side) / 2), round((height - side) / 2)


CENTRE = Framing()
