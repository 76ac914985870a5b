"""Tables of picture paths and captions: csv, tsv, jsonl and parquet files."""

from __future__ import annotations

import array
import dataclasses
import difflib
import hashlib
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from clipx.data.base import Example, Source
from clipx.data.tables import inference
from clipx.data.tables.formats import File, strings, tables
from clipx.errors import BadSample, DataError

_LOOKED_AT = 200  # rows from which to infer the folder of the pictures
_SHOWN = 10  # values of a column listed in an error
_MARK = "\0"  # stored in place of an empty path, before the row's file name and number


@dataclasses.dataclass(frozen=True)
class Table(Source):
    """Rows of csv, tsv, jsonl or parquet files that each name a picture file.

    Rows with the same picture are one example with several captions. Examples are in the order in
    which their pictures first appear. A cell may be a list of captions. Empty captions are dropped.

    Reading an example raises `BadSample` if its picture file is missing or empty, or if no caption
    is left. The constructor raises `DataError` if a table itself is wrong.
    """

    path: str | tuple[str, ...]  # a file, a glob or a brace range, or several
    image: str = ""  # column with the picture's path; '': inferred
    captions: str | tuple[str, ...] = ()  # column or columns; () or '': inferred
    separator: str = ""  # of csv and tsv: one character, or tab; '': inferred
    root: str = ""  # folder to which the paths are relative; '': inferred
    where: str = ""  # column=value: reads only these rows
    label: str = ""  # column of labels: numbers, or names of classes
    classes: tuple[str, ...] = ()  # names of the labels; (): the names in the column, sorted

    def __post_init__(self) -> None:
        self._labels: np.ndarray | None  # of each example; None without a column of labels
        self._captioned: bool  # the table has columns of captions
        self._roots: tuple[str, ...]  # the folder of the pictures, by table
        self._folder: str  # prefix of absolute paths that keys leave out
        # the arrays of `_Rows.arrays`
        self._entries: np.ndarray
        self._root_ends: np.ndarray
        self._paths: np.ndarray
        self._path_ends: np.ndarray
        self._words: np.ndarray
        self._word_ends: np.ndarray
        self._caption_order: np.ndarray
        self._caption_ends: np.ndarray
        column, _, wanted = (part.strip() for part in self.where.partition("="))
        if self.where and not (column and wanted):
            raise DataError(f"where={self.where!r}: expected column=value")
        image = self.image
        captions = (self.captions,) if isinstance(self.captions, str) else self.captions
        captions = tuple(filter(None, captions))
        rows, values = _Rows(), dict[str, None]()
        for file in tables(self.path, self.separator):
            image, captions = inference.layout(
                file, image=image, captions=captions, label=self.label, where=column
            )
            names = [image, *captions, *filter(None, (self.label, column))]
            cells_of_rows = file.rows(names)
            if column:
                cells_of_rows = _only(cells_of_rows, wanted, values)
            start = list(itertools.islice(cells_of_rows, _LOOKED_AT))
            paths = [_path(file, number, image, cells[0]) for number, cells in start]
            paths = [path for path in paths if not path.startswith(_MARK)]
            rows.start_file(inference.root(file.path, self.root, paths))
            for number, cells in itertools.chain(start, cells_of_rows):
                rows.add(
                    _path(file, number, image, cells[0]),
                    _words(file, number, captions, cells[1:]),
                    _one(cells[1 + len(captions)]) if self.label else "",
                )
        if not rows.labels:
            name = self.path if isinstance(self.path, str) else self.path[0]
            if not values:
                raise DataError(f"{name}: no rows")
            listed = ", ".join(map(repr, itertools.islice(values, _SHOWN)))
            more = " and more" if len(values) > _SHOWN else ""
            raise DataError(
                f"{name}: no row has {self.where}; the values of {column} are {listed}{more}"
            )
        classes, labels = self.classes, None
        arrays = rows.arrays()
        if self.label:
            classes, labels = rows.label(arrays.pop("examples"), self.classes, self.label)
        for name, value in (  # the dataclass is frozen
            ("classes", classes),
            ("_labels", labels),
            ("_captioned", bool(captions)),
            ("_roots", tuple(rows.roots)),
            ("_folder", rows.folder()),
            *((f"_{name}", value) for name, value in arrays.items()),
        ):
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, row: int) -> Example:
        if not 0 <= row < len(self):
            raise IndexError(row)
        path, key = self._path(row), self._key(row)
        if path.startswith(_MARK):
            raise BadSample(key, "the path of the picture is empty")
        root = self._roots[np.searchsorted(self._root_ends, self._entries[row], side="right")]
        try:
            with open(os.path.join(root, path), "rb") as file:
                image = file.read()
        except OSError as error:
            full = os.path.join(root, path)
            raise BadSample(key, f"{full} cannot be read ({error.strerror})") from None
        if not image:
            raise BadSample(key, "the picture has no bytes")
        start = self._caption_ends[row - 1] if row else 0
        captions = self._caption_order[start : self._caption_ends[row]].tolist()
        if self._captioned and not captions:
            raise BadSample(key, "empty caption")
        texts = tuple(_cut(self._words, self._word_ends, i) for i in captions)
        label = None if self._labels is None else int(self._labels[row])
        return Example(image, texts, row, key, None if label == -1 else label)

    def keys(self) -> Iterator[str]:
        return map(self._key, range(len(self)))

    def _path(self, row: int) -> str:
        return _cut(self._paths, self._path_ends, self._entries[row])

    def _key(self, row: int) -> str:
        return self._path(row).removeprefix(_MARK).removeprefix(self._folder)


class _Rows:
    """Collects the rows of tables in a few flat arrays.

    An entry is a run of consecutive rows with the same picture and label. `arrays` merges the
    entries with the same picture into one example at the end. So reading a table of millions of
    rows needs only a hash per entry to identify pictures.
    """

    def __init__(self) -> None:
        self.roots: list[str] = []
        self._root_starts: list[int] = []  # the first entry of each root
        self._paths, self._path_ends = bytearray(), array.array("q")
        self._hashes = bytearray()  # eight bytes per entry
        self._words, self._word_ends = bytearray(), array.array("q")
        self._owners = array.array("i")  # the entry of each caption
        self.labels = array.array("i")  # of each entry, an index into `_names`; -1 for none
        self._names: dict[str, int] = {}
        self._last: tuple[str, str] | None = None
        self._common = ""  # common prefix of the absolute paths

    def start_file(self, root: str) -> None:
        self.roots.append(root)
        self._root_starts.append(len(self.labels))
        self._last = None

    def add(self, path: str, texts: list[str], label: str) -> None:
        if (path, label) != self._last:
            self._last = path, label
            name = f"{self.roots[-1]}\0{path}".encode("utf-8", "replace")
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
            "words": np.frombuffer(self._words, np.uint8),
            "word_ends": np.frombuffer(self._word_ends, np.int64),
            "caption_order": np.argsort(example_of_caption, kind="stable").astype(np.int32),
            "caption_ends": np.cumsum(counts).astype(np.int32),
        }

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
            path = _cut(np.frombuffer(self._paths, np.uint8), self._path_ends, entry)
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
    digits = [re.fullmatch(r"\d+", name) for name in names]
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


def _only(
    rows: Iterator[tuple[int, list[Any]]], wanted: str, values: dict[str, None]
) -> Iterator[tuple[int, list[Any]]]:
    """Yields the rows whose last cell is `wanted`. Adds the values of these cells to `values`."""
    for number, cells in rows:
        value = _one(cells[-1])
        if len(values) < 1000:
            values.setdefault(value)
        if value == wanted:
            yield number, cells


def _one(cell: Any) -> str:
    """The value of a cell as one string."""
    return ", ".join(strings(cell) or ())


def _path(file: File, number: int, column: str, cell: Any) -> str:
    """The path in a cell; `_MARK` and the number of the row if the cell is empty."""
    values = strings(cell)
    if values is None or len(values) > 1:
        kind = type(cell).__name__
        raise DataError(
            f"{file.path}: {file.unit} {number}: column {column} holds a {kind}, expected a path"
        )
    if not values or not values[0]:
        return f"{_MARK}{os.path.basename(file.path)} {file.unit} {number}"
    path = values[0]
    # normalised, so that all rows of one picture have the same path
    longer = "./" in path or ("//" in path and "://" not in path)
    return os.path.normpath(path) if longer else path


def _words(file: File, number: int, columns: tuple[str, ...], cells: list[Any]) -> list[str]:
    """The captions in the cells of one row, without empty ones."""
    texts: list[str] = []
    for column, cell in zip(columns, cells):
        captions = strings(cell)
        if captions is None:
            raise DataError(
                f"{file.path}: {file.unit} {number}: column {column} holds a "
                f"{type(cell).__name__}, expected a string or a list of strings"
            )
        texts += filter(None, captions)
    return texts


def _cut(data: np.ndarray, ends: Sequence[int] | np.ndarray, i: int) -> str:
    """The i-th string of the concatenated bytes `data`."""
    return data[ends[i - 1] if i else 0 : ends[i]].tobytes().decode()
