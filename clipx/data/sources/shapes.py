"""Generated pictures of coloured shapes with captions: a data set without files.

Every picture has one or two shapes on a light, noisy background. The classes are all pairs of a
colour and a shape. One eighth of the pairs is held out: `train` never shows or names them, and
`test` shows nothing else. A model that classifies them correctly among all classes has combined
colours and shapes that it only saw in other pairs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Annotated, ClassVar, Literal

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw

from clipx.config.ranges import Count, Range
from clipx.data.base import Example, Source

COLOURS = {
    "red": (220, 30, 30),
    "yellow": (250, 215, 20),
    "lime": (150, 230, 40),
    "green": (20, 130, 50),
    "cyan": (20, 200, 220),
    "blue": (30, 90, 240),
    "navy": (25, 30, 130),
    "purple": (140, 50, 180),
    "pink": (250, 120, 190),
    "brown": (145, 80, 25),
    "grey": (130, 130, 130),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "moon")
_NAMES = tuple(COLOURS)
_KINDS = len(SHAPES)
CLASSES = tuple(f"{colour} {shape}" for colour in _NAMES for shape in SHAPES)
# one pair per colour, so that `train` has seven shapes of every colour, ten or more colours of
# every shape
HELD_OUT = tuple(c * _KINDS + (3 * c + 1) % _KINDS for c in range(len(_NAMES)))
_TRAINED = tuple(i for i in range(len(CLASSES)) if i not in HELD_OUT)

_PLACES = {
    "on the left": (-1, 0),
    "on the right": (1, 0),
    "at the top": (0, -1),
    "at the bottom": (0, 1),
    "in the middle": (0, 0),
}
_RELATIONS = {
    ("left of", "to the left of"): (-1, 0),
    ("right of", "to the right of"): (1, 0),
    ("above", "over"): (0, -1),
    ("below", "under"): (0, 1),
}
_OUTLINE = (40, 40, 40)
_Spot = tuple[int, np.ndarray, float]  # an object: label, centre and radius
_Draw = Callable[[np.random.Generator, list[_Spot]], UInt8[np.ndarray, "h w 3"] | bytes]
_FINE = 3  # antialiasing: masks are rendered at this multiple of their size, then averaged


def _star() -> Float[np.ndarray, "10 2"]:
    angle = np.arange(10) * math.pi / 5
    radius = np.where(np.arange(10) % 2, 0.45, 1.1)
    return np.stack([radius * np.sin(angle), -radius * np.cos(angle)], -1)


def _heart() -> Float[np.ndarray, "48 2"]:
    t = np.linspace(0, 2 * math.pi, 48, endpoint=False)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([np.sin(t) ** 3, -(y + 2.5) / 15], -1)


_A = 0.34  # half the width of the bars of the cross
_POLYGONS = {  # corners in a square of side 2 around the origin; y points down
    "square": np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * 0.95,
    "triangle": np.array([(0, -1), (1.05, 0.85), (-1.05, 0.85)]),
    "star": _star(),
    "cross": np.array(
        [(-_A, -1), (_A, -1), (_A, -_A), (1, -_A), (1, _A), (_A, _A)]
        + [(_A, 1), (-_A, 1), (-_A, _A), (-1, _A), (-1, -_A), (-_A, -_A)]
    ),
    "heart": _heart(),
}


@dataclasses.dataclass(frozen=True)
class Shapes(Source):
    """Row i is a pure function of `split`, `image_size` and i.

    In `test` every picture shows one object of a held-out class. `label` is the index of its class
    in `classes`; training pictures with two objects have none.
    """

    split: Literal["train", "test"] = "train"
    size: Count | None = None  # rows; None: 16,384 in `train`, 600 in `test`
    image_size: Annotated[int, Range(16, 2**14)] = 64  # pixels per side

    classes = CLASSES
    alike: ClassVar[bool] = True

    def __len__(self) -> int:
        return self.size or (600 if self.split == "test" else 16384)

    def __getitem__(self, row: int) -> Example:
        return self._example(row, self._draw)

    def glance(self, row: int) -> Example:
        """As `Source.glance`: nothing is drawn."""
        return self._example(row, lambda rng, spots: b"")

    def _example(self, row: int, draw: _Draw) -> Example:
        if not 0 <= row < len(self):
            raise IndexError(row)
        test = self.split == "test"
        rng = np.random.Generator(np.random.Philox(key=[int(test), row]))
        key = self._key(row)
        if test or rng.random() < 0.7:
            label = HELD_OUT[row % len(HELD_OUT)] if test else _TRAINED[rng.integers(len(_TRAINED))]
            image, names, parts = self._single(rng, label, draw)
            return Example(image, names if test else names + parts, row, key, label)
        return Example(*self._pair(rng, draw), row, key)

    def keys(self) -> Iterator[str]:
        return map(self._key, range(len(self)))

    def _key(self, row: int) -> str:
        return f"shapes/{self.split}/{row:06d}"

    def _single(
        self, rng: np.random.Generator, label: int, draw: _Draw
    ) -> tuple[UInt8[np.ndarray, "h w 3"] | bytes, tuple[str, ...], tuple[str, ...]]:
        """Returns (a picture of one object, captions with its class, captions without it)."""
        name = CLASSES[label]
        colour, shape = name.split()
        if rng.random() < 0.8:  # most objects are easy to see, to make minutes of training enough
            size, radius, place = "large", 0.37, "in the middle"
        else:
            size, radius, place = "small", 0.19, list(_PLACES)[rng.integers(len(_PLACES))]
        radius *= rng.uniform(0.9, 1.1)
        centre = 0.5 + np.array(_PLACES[place]) * (0.45 - radius) + rng.uniform(-0.03, 0.03, 2)
        image = draw(rng, [(label, centre, radius)])
        names = (
            f"a {name}",
            f"a picture of a {name}",
            f"a {size} {name}",
            f"a {name} {place}",
            f"there is a {size} {name} {place}",
        )
        # captions with only the colour or only the shape help to learn the two separately
        parts = (
            f"a {shape}",
            f"a picture of a {shape}",
            f"a {size} {shape}",
            f"something {colour}",
        )
        return image, names, parts

    def _pair(
        self, rng: np.random.Generator, draw: _Draw
    ) -> tuple[UInt8[np.ndarray, "h w 3"] | bytes, tuple[str, ...]]:
        """Returns (a picture of two objects, captions)."""
        a, b = (int(i) for i in rng.choice(_TRAINED, 2, replace=False))
        words = list(_RELATIONS)[rng.integers(len(_RELATIONS))]
        away = np.array(_RELATIONS[words]) * 0.24
        radii = rng.uniform(0.17, 0.2, 2)
        shift = rng.uniform(-0.03, 0.03, (2, 2))
        along = np.where(away == 0, rng.uniform(-0.2, 0.2, 2), 0)  # moves both objects together
        spots = [(a, 0.5 + away + along + shift[0], radii[0])]
        spots += [(b, 0.5 - away + along + shift[1], radii[1])]
        first, second = CLASSES[a], CLASSES[b]
        colours, shapes = zip(first.split(), second.split())
        texts = (
            f"a {first} {words[0]} a {second}",
            f"a {first} {words[1]} a {second}",
            f"a {first} and a {second}",
            f"a picture of a {first} {words[0]} a {second}",
            f"a {shapes[0]} {words[0]} a {shapes[1]}",
            f"something {colours[0]} and something {colours[1]}",
        )
        return draw(rng, spots), texts

    def _draw(self, rng: np.random.Generator, spots: list[_Spot]) -> UInt8[np.ndarray, "h w 3"]:
        """Renders objects (label, centre, radius), in units of the side, on a random background."""
        side = self.image_size
        ground = rng.integers(222, 241, 3).astype(np.uint8)  # lighter than every shape
        noise = np.frombuffer(rng.bytes(side * side * 3), np.uint8).reshape(side, side, 3)
        image = Image.fromarray(ground + (noise & 15))
        for label, centre, radius in spots:
            colour = np.array(COLOURS[_NAMES[label // _KINDS]]) + rng.integers(-16, 17, 3)
            outer, inner, corner = _masks(SHAPES[label % _KINDS], centre * side, radius * side)
            image.paste(_OUTLINE, corner, outer)
            image.paste(tuple(np.clip(colour, 0, 255).tolist()), corner, inner)
        return np.asarray(image)


def _masks(
    shape: str, centre: np.ndarray, radius: float
) -> tuple[Image.Image, Image.Image, tuple[int, int]]:
    """Returns (mask of the shape, mask of the shape without its outline, upper left pixel of both).

    The masks are images in mode L.
    """
    corner = np.floor(centre - 1.15 * radius).astype(int)
    cells = math.ceil(2.3 * radius) + 1
    mask = Image.new("L", (cells * _FINE, cells * _FINE))
    draw = ImageDraw.Draw(mask)
    (x, y), r = ((centre - corner) * _FINE).tolist(), radius * _FINE

    def disc(x: float, y: float, r: float, ink: int) -> None:
        draw.ellipse((x - r, y - r, x + r, y + r), fill=ink)

    if shape in _POLYGONS:
        draw.polygon((_POLYGONS[shape] * r + (x, y)).ravel().tolist(), fill=255)
    else:
        disc(x, y, r, 255)
    if shape == "ring":
        disc(x, y, 0.5 * r, 0)
    elif shape == "moon":
        disc(x + 0.5 * r, y - 0.2 * r, 0.8 * r, 0)
    outer = np.asarray(mask)
    inner, edge = outer.copy(), max(1, round(0.13 * r))
    for shifted, kept in (
        (outer[edge:], inner[:-edge]),
        (outer[:-edge], inner[edge:]),
        (outer[:, edge:], inner[:, :-edge]),
        (outer[:, :-edge], inner[:, edge:]),
    ):
        np.minimum(kept, shifted, out=kept)
    inside = Image.fromarray(inner)
    return mask.reduce(_FINE), inside.reduce(_FINE), (int(corner[0]), int(corner[1]))
