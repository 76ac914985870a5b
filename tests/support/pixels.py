"""Data and an encoder for testing evaluators. Each picture is one pixel that holds its row and its
set; the encoder looks both up in tables."""

import dataclasses

import numpy as np

from clipx.types import Encoded


@dataclasses.dataclass
class Examples:
    """Red holds the row, green the set. The first caption of a row is `<set> <row>`."""

    labels: list
    which: int = 0
    classes: tuple[str, ...] = ()
    without_caption: int | None = None

    def __len__(self):
        return len(self.labels)

    def label(self, row):
        return self.labels[row]

    def texts(self, row):
        return () if row == self.without_caption else (f"{self.which} {row}", "another")

    def batches(self, size):
        pixels = np.zeros((len(self), 1, 1, 3), np.uint8)
        pixels[:, 0, 0, 0], pixels[:, 0, 0, 1] = np.arange(len(self)), self.which
        yield from (pixels[i : i + size] for i in range(0, len(self), size))


class Encode:
    """Returns rows of the tables `sets` and `texts` as the field `field`, the only one allowed."""

    def __init__(self, field, *sets, texts=None):
        self.field, self.sets, self.texts = field, sets, texts

    def image(self, pictures, fields=()):
        assert fields == (self.field,)
        rows = [self.sets[p[1]][p[0]] for p in pictures[:, 0, 0]]
        return Encoded(**{self.field: np.stack(rows)})

    def text(self, texts, fields=()):
        assert fields == (self.field,)
        return Encoded(**{self.field: np.stack([self.texts[int(t.split()[1])] for t in texts])})


def draw(seed, rows, classes, spread):
    """Random rows around the centres of their classes, and the labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, rows)
    centres = np.random.default_rng(9).normal(size=(classes, 8))
    return centres[labels] + spread * rng.normal(size=(rows, 8)), labels


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)
