"""Collects the rows of tables: those of one picture become one example."""

from __future__ import annotations

import array
import difflib
import hashlib
import os
import re
from collections.abc import Sequence

import numpy as np

from clipx.errors import DataError


class Rows:
    """Collects the rows of tables in a few flat arrays.

    An entry is a run of consecutive rows with the same picture and label. `arrays` merges the
    entries with the same picture into one example at the end. So reading a table of millions of
    rows needs only a hash per entry to identify pictures.
    """

    def __init__(self) -> None:
        self.roots: list[str] = []
        self.containers: list[str] = []  # of each root, the file that holds its pictures
        self._places = array.array("q")  # offset and size in the container; -1, -1 for a path
        self._root_starts: list[int] = []  # the first entry of each root
        self._paths, self._path_ends = bytearray(), array.array("q")
        self._hashes = bytearray()  # eight bytes per entry
        self._words, self._word_ends = bytearray(), array.array("q")
        self._owners = array.array("i")  # the entry of each caption
        self.labels = array.array("i")  # of each entry, an index into `_names`; -1 for none
        self._names: dict[str, int] = {}
        self._last: tuple[str, str] | None = None  # identity and label
        self._common = ""  # common prefix of the absolute paths

    def start_file(self, root: str, container: str = "") -> None:
        """The rows that follow have their pictures in the folder `root`, or inside `container`."""
        self.roots.append(root)
        self.containers.append(container)
        self._root_starts.append(len(self.labels))
        self._last = None

    def add(
        self,
        path: str,
        texts: list[str],
        label: str,
        place: tuple[int, int] = (-1, -1),
        identity: str = "",
    ) -> None:
        """place: of a picture inside the container. identity: what rows of one picture share;
        default: the path."""
        identity = identity or path
        if (identity, label) != self._last:
            self._last = identity, label
            name = f"{self.roots[-1]}\0{identity}".encode("utf-8", "replace")
            self._places.extend(place)
            self._hashes += hashlib.blake2b(name, digest_size=8).digest()
            self._paths += path.encode("utf-8", "replace")
            self._path_ends.append(len(self._paths))
            self.labels.append(self._names.setdefault(label, len(self._names)) if label else -1)
            if os.path.isabs(path) and not (self._common and path.startswith(self._common)):
                first = os.path.join(os.path.dirname(path), "")
                self._common = os.path.commonprefix([self._common or first, path])
        for text in texts:
            self._words += text.encode("utf-8", "replace")
            self._word_ends.append(len(self._words))
            self._owners.append(len(self.labels) - 1)

    def folder(self) -> str:
        """The common folder of all absolute paths, with its slash; '' if all are relative."""
        return self._common[: self._common.rfind("/") + 1]

    def arrays(self) -> dict[str, np.ndarray]:
        """The examples as flat arrays:

        examples                     the example of each entry
        entries                      the first entry of each example
        root_ends                    the end of each root's entries
        paths, path_ends             the bytes of all paths, and the end of each entry's path
        places                       offset and size of each entry's picture in its container
        words, word_ends             the bytes of all captions, and the end of each caption
        caption_order, caption_ends  captions sorted by example, and the end of each example's
        """
        hashes = np.frombuffer(self._hashes, np.uint64)
        _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
        order = np.argsort(first)  # examples in the order of their first entries
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        examples = rank[inverse]
        example_of_caption = examples[np.frombuffer(self._owners, np.int32)]
        counts = np.bincount(example_of_caption, minlength=len(order))
        return {
            "examples": examples,
            "entries": first[order].astype(np.int32),
            "root_ends": np.array([*self._root_starts[1:], len(examples)], np.int32),
            "paths": np.frombuffer(self._paths, np.uint8),
            "path_ends": np.frombuffer(self._path_ends, np.int64),
            "places": self._place_array(),
            "words": np.frombuffer(self._words, np.uint8),
            "word_ends": np.frombuffer(self._word_ends, np.int64),
            "caption_order": np.argsort(example_of_caption, kind="stable").astype(np.int32),
            "caption_ends": np.cumsum(counts).astype(np.int32),
        }

    def _place_array(self) -> np.ndarray:
        """[entries, 2], or [0, 2] if no picture is inside a container."""
        places = np.frombuffer(self._places, np.int64).reshape(-1, 2)
        return places if (places[:, 1] >= 0).any() else places[:0]

    def label(
        self, examples: np.ndarray, classes: tuple[str, ...], column: str
    ) -> tuple[tuple[str, ...], np.ndarray]:
        """Returns (names of the classes, label of each example with -1 for none)."""
        if not self._names:
            raise DataError(f"label={column!r}: every cell of the column is empty")
        codes = np.frombuffer(self.labels, np.int32)
        merged = np.full(examples.max() + 1, -1, np.int32)
        np.maximum.at(merged, examples, codes)
        (conflicts,) = np.nonzero((codes >= 0) & (codes != merged[examples]))
        names = list(self._names)
        if len(conflicts):
            entry = conflicts[0]
            both = names[codes[entry]], names[merged[examples[entry]]]
            path = cut(np.frombuffer(self._paths, np.uint8), self._path_ends, entry)
            raise DataError(
                f"{path}: the labels {both[0]!r} and {both[1]!r}, expected one label per picture"
            )
        classes, numbers = _numbers(names, classes, column)
        return classes, np.append(numbers, -1).astype(np.int32)[merged]


def _numbers(
    names: list[str], classes: tuple[str, ...], column: str
) -> tuple[tuple[str, ...], list[int]]:
    """Returns (classes, index of each name in the column).

    A name is that of a class, or else the index of a class in digits. Without `classes`, they are
    the sorted names, or none at all if every name is a number.
    """
    digits = [re.fullmatch(r"\d{1,9}", name) for name in names]  # more: an id, not a number
    if not classes:
        if all(digits):
            return (), list(map(int, names))
        classes = tuple(sorted(names))
    indices = {name: i for i, name in enumerate(classes)}
    numbers = []
    for name, is_number in zip(names, digits):
        number = indices.get(name, int(name) if is_number else -1)
        if not 0 <= number < len(classes):
            near = difflib.get_close_matches(name, classes, n=1)
            raise DataError(
                f"label={column!r}: {name!r} is not one of the {len(classes)} classes"
                + (f"; nearest: {near[0]!r}" if near else "")
            )
        numbers.append(number)
    return classes, numbers


def cut(data: np.ndarray, ends: Sequence[int] | np.ndarray, i: int) -> str:
    """The i-th string of the concatenated bytes `data`."""
    return data[ends[i - 1] if i else 0 : ends[i]].tobytes().decode()
