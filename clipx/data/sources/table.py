"""Tables of picture paths and captions: csv, tsv, jsonl, parquet."""

from __future__ import annotations

import array
import dataclasses
import difflib
import hashlib
import itertools
import os
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from clipx.data.base import Example, Source
from clipx.data.tables import inference
from clipx.data.tables.formats import File, strings, tables
from clipx.errors import BadSample, DataError

_LOOKED_AT = 200  # rows, to tell where the pictures lie
_SHOWN = 10  # values of a column, in an error
_MARK = "\0"  # no path starts with it: what follows says where a row without a path is


@dataclasses.dataclass(frozen=True)
class Table(Source):
    """Rows of a csv, tsv, jsonl or parquet file, or of several, that name a picture file each.

    Rows with the same picture are one example with several captions; examples come in the order
    in which their pictures first appear. A cell may be a list of captions. Empty captions are
    dropped, and an example that has none left is a `BadSample` when it is read, as is one whose
    file is missing or empty. What is wrong with a table itself is a `DataError` when it is opened.
    """

    path: str | tuple[str, ...]  # a table, a glob, a brace range, or several
    image: str = ""  # column of the picture's path; '': found
    captions: str | tuple[str, ...] = ()  # column or columns; () or '': found
    separator: str = ""  # of csv and tsv: a character, or tab; '': found
    root: str = ""  # folder to which the paths are relative; '': found
    where: str = ""  # column=value: no other rows are read
    label: str = ""  # column of labels: numbers, or names of classes
    classes: tuple[str, ...] = ()  # names of the labels; (): the names in the column, sorted

    def __post_init__(self):
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
            found = _only(file.rows(names), wanted, values) if column else file.rows(names)
            start = list(itertools.islice(found, _LOOKED_AT))
            paths = [_path(file, number, image, cells[0]) for number, cells in start]
            paths = [path for path in paths if not path.startswith(_MARK)]
            rows.start_file(inference.root(file.path, self.root, paths))
            for number, cells in itertools.chain(start, found):
                rows.add(
                    _path(file, number, image, cells[0]),
                    _words(file, number, captions, cells[1:]),
                    _one(cells[1 + len(captions)]) if self.label else "",
                )
        if not rows.labels:
            name = self.path if isinstance(self.path, str) else self.path[0]
            there = ", ".join(map(repr, itertools.islice(values, _SHOWN)))
            more = " and more" if len(values) > _SHOWN else ""
            reason = f"no row has {self.where}; {column} is {there}{more}" if values else "no rows"
            raise DataError(f"{name}: {reason}")
        classes, labels = self.classes, None
        arrays = rows.arrays()
        if self.label:
            classes, labels = rows.label(arrays.pop("examples"), self.classes, self.label)
        for name, value in (
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
            raise BadSample(key, "no path of a picture")
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
    """The rows of tables as a few flat arrays, gathered one after another.

    An entry is a run of rows with one picture. Entries of one picture become one example at the
    end: so nothing but a hash is kept by picture while a table of millions of rows is read.
    """

    def __init__(self):
        self.roots: list[str] = []
        self._root_starts: list[int] = []  # the first entry of each root
        self._paths, self._path_ends = bytearray(), array.array("q")
        self._hashes = bytearray()  # eight bytes an entry
        self._words, self._word_ends = bytearray(), array.array("q")
        self._owners = array.array("i")  # the entry of each caption
        self.labels = array.array("i")  # of each entry, an index into `_names`; -1 for none
        self._names: dict[str, int] = {}
        self._last: tuple[str, str] | None = None
        self._common = ""  # start of every absolute path

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
        """The folder, with its slash, in which all absolute paths lie; '' for relative ones."""
        return self._common[: self._common.rfind("/") + 1]

    def arrays(self) -> dict[str, np.ndarray]:
        """Paths and captions, each as bytes and their ends, and the entry and the captions of each
        example; `examples` says the example of each entry."""
        hashes = np.frombuffer(self._hashes, np.uint64)
        _, first, which = np.unique(hashes, return_index=True, return_inverse=True)
        order = np.argsort(first)  # examples by the place of their first entry
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        examples = rank[which]
        of_caption = examples[np.frombuffer(self._owners, np.int32)]
        counts = np.bincount(of_caption, minlength=len(order))
        return {
            "examples": examples,
            "entries": first[order].astype(np.int32),
            "root_ends": np.array([*self._root_starts[1:], len(examples)], np.int32),
            "paths": np.frombuffer(self._paths, np.uint8),
            "path_ends": np.frombuffer(self._path_ends, np.int64),
            "words": np.frombuffer(self._words, np.uint8),
            "word_ends": np.frombuffer(self._word_ends, np.int64),
            "caption_order": np.argsort(of_caption, kind="stable").astype(np.int32),
            "caption_ends": np.cumsum(counts).astype(np.int32),
        }

    def label(self, examples: np.ndarray, classes: tuple[str, ...], column: str):
        """The names of the classes and the label of each example, -1 for none."""
        if not self._names:
            raise DataError(f"label={column!r}: every cell of the column is empty")
        codes = np.frombuffer(self.labels, np.int32)
        found = np.full(examples.max() + 1, -1, np.int32)
        np.maximum.at(found, examples, codes)
        (odd,) = np.nonzero((codes >= 0) & (codes != found[examples]))
        names = list(self._names)
        if len(odd):
            both = names[codes[odd[0]]], names[found[examples[odd[0]]]]
            path = _cut(np.frombuffer(self._paths, np.uint8), self._path_ends, odd[0])
            raise DataError(f"{path}: labels {both[0]!r} and {both[1]!r}, expected one a picture")
        classes, numbers = _numbers(names, classes, column)
        return classes, np.append(numbers, -1).astype(np.int32)[found]


def _numbers(
    names: list[str], classes: tuple[str, ...], column: str
) -> tuple[tuple[str, ...], list[int]]:
    """The classes, and the index of each name among them: a name stands for itself or, where the
    classes do not say it, for a number."""
    whole = [re.fullmatch(r"\d+", name) for name in names]
    if not classes:
        if all(whole):
            return (), list(map(int, names))
        classes = tuple(sorted(names))
    places = {name: i for i, name in enumerate(classes)}
    numbers = []
    for name, digits in zip(names, whole):
        number = places.get(name, int(name) if digits else -1)
        if not 0 <= number < len(classes):
            near = difflib.get_close_matches(name, classes, n=1)
            raise DataError(
                f"label={column!r}: {name!r} is none of the {len(classes)} classes"
                + (f", nearest is {near[0]!r}" if near else "")
            )
        numbers.append(number)
    return classes, numbers


def _only(rows: Iterator[tuple[int, list]], wanted: str, values: dict[str, None]):
    """The rows that say `wanted` in their last cell. `values` gathers what the cells say."""
    for number, cells in rows:
        value = _one(cells[-1])
        if len(values) < 1000:
            values.setdefault(value)
        if value == wanted:
            yield number, cells


def _one(cell: Any) -> str:
    """The one thing that a cell says, as a string."""
    return ", ".join(strings(cell) or ())


def _path(file: File, number: int, column: str, cell: Any) -> str:
    found = strings(cell)
    if found is None or len(found) > 1:
        kind = type(cell).__name__
        raise DataError(
            f"{file.path}: {file.unit} {number}: column {column} holds a {kind}, expected a path"
        )
    if not found or not found[0]:
        return f"{_MARK}{os.path.basename(file.path)} {file.unit} {number}"
    path = found[0]
    # as short as it can be, so that one picture has one path
    longer = "./" in path or ("//" in path and "://" not in path)
    return os.path.normpath(path) if longer else path


def _words(file: File, number: int, columns: tuple[str, ...], cells: list) -> list[str]:
    """The captions in the cells of one row, without empty ones."""
    texts: list[str] = []
    for column, cell in zip(columns, cells):
        found = strings(cell)
        if found is None:
            raise DataError(
                f"{file.path}: {file.unit} {number}: column {column} holds a "
                f"{type(cell).__name__}, expected a string or a list of strings"
            )
        texts += filter(None, found)
    return texts


def _cut(data: np.ndarray, ends, i: int) -> str:
    return data[ends[i - 1] if i else 0 : ends[i]].tobytes().decode()
