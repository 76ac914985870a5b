"""Tables of picture paths and captions: csv, tsv, jsonl and parquet files."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import os
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

from clipx.data.base import Account, Example, Guess, Skipped, Source
from clipx.data.reading import read, read_file, stamps
from clipx.data.storage import ABSENT, Shard, of_file
from clipx.data.tables import inference, paths
from clipx.data.tables.cells import strings
from clipx.data.tables.columnar import Columnar, Pictures
from clipx.data.tables.delimited import Csv
from clipx.data.tables.formats import File, tables
from clipx.data.tables.rows import Rows, cut
from clipx.data.tables.separators import spelt
from clipx.data.tars import Tally
from clipx.errors import BadSample, DataError

_LOOKED_AT = 200  # rows from which to infer the folder of the pictures
_SHOWN = 10  # values of a column listed in an error
_MARK = "\0"  # stored in place of an empty path, before the row's file name and number


@dataclasses.dataclass(frozen=True)
class Table(Source):
    """Rows of csv, tsv, json, jsonl, parquet or arrow files that each name or hold a picture.

    Rows with the same picture are one example with several captions. Examples are in the order in
    which their pictures first appear. A cell may be a list of captions. Empty captions are dropped.

    A json file is one object per line, a list of objects, COCO's captions, Karpathy's splits, or
    {picture: captions}. Columns of parquet and arrow files may hold the pictures, alone or as
    {bytes, path}.

    Reading an example raises `BadSample` if its picture file is missing or empty, or if no caption
    is left. The constructor raises `DataError` if a table itself is wrong, or if it cannot say
    which columns are meant.
    """

    path: str | tuple[str, ...]  # a file, a glob or a brace range, or several
    image: str = ""  # column with the pictures or their paths; '': inferred
    captions: str | tuple[str, ...] = ()  # column or columns; () or '': inferred
    separator: str = ""  # of csv and tsv: one character, or tab; '': inferred
    # cells: quotes in csv and tsv enclose cells; letters: they are text; '': inferred
    quotes: Literal["", "cells", "letters"] = ""
    root: str = ""  # folder to which the paths are relative; '': inferred
    where: str = ""  # column=value: reads only these rows
    label: str = ""  # column of labels: numbers, or names of classes
    classes: tuple[str, ...] = ()  # names of the labels; (): the names in the column, sorted

    def __post_init__(self) -> None:
        self._labels: np.ndarray | None  # of each example; None without a column of labels
        self._captioned: bool  # the table has columns of captions
        self._roots: tuple[str, ...]  # the folder of the pictures, by table
        # the file that holds the pictures, by table
        self._containers: tuple[Shard | None, ...]
        self._stamps: np.ndarray  # of each example's file
        self._folder: str  # prefix of absolute paths that keys leave out
        # the arrays of `Rows.arrays`
        self._entries: np.ndarray
        self._root_ends: np.ndarray
        self._paths: np.ndarray
        self._path_ends: np.ndarray
        self._places: np.ndarray
        self._words: np.ndarray
        self._word_ends: np.ndarray
        self._caption_order: np.ndarray
        self._caption_ends: np.ndarray
        self._account: Account
        self._guesses: tuple[Guess, ...]
        reader = _Reader(self)
        for file in tables(self.path, self.separator, self.quotes):
            reader.read(file)
        rows = reader.rows
        if not rows.labels:
            raise reader.nothing()
        classes, labels = self.classes, None
        arrays = rows.arrays()
        examples = arrays.pop("examples")
        if self.label:
            classes, labels = rows.label(examples, self.classes, self.label)
        for name, value in (  # the dataclass is frozen
            ("classes", classes),
            ("_labels", labels),
            ("_captioned", bool(reader.captions)),
            ("_roots", tuple(rows.roots)),
            ("_containers", tuple(of_file(file) if file else None for file in rows.containers)),
            ("_folder", rows.folder()),
            ("_account", reader.account()),
            ("_guesses", tuple(reader.guesses.values())),
            *((f"_{name}", value) for name, value in arrays.items()),
        ):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "_stamps", stamps(self._files()))

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, row: int) -> Example:
        if not 0 <= row < len(self):
            raise IndexError(row)
        image = self._image(row)
        if not image:
            raise BadSample(self._key(row), "the picture has no bytes")
        return self.glance(row)._replace(image=image)

    def glance(self, row: int) -> Example:
        """As `Source.glance`: reads no picture."""
        if not 0 <= row < len(self):
            raise IndexError(row)
        key = self._key(row)
        start = self._caption_ends[row - 1] if row else 0
        captions = self._caption_order[start : self._caption_ends[row]].tolist()
        if self._captioned and not captions:
            raise BadSample(key, "empty caption")
        texts = tuple(cut(self._words, self._word_ends, i) for i in captions)
        self.limits.check_texts(key, texts)
        label = None if self._labels is None else int(self._labels[row])
        return Example(b"", texts, row, key, None if label == -1 else label)

    def keys(self) -> Iterator[str]:
        return map(self._key, range(len(self)))

    def file(self, row: int) -> str:
        """The path of a row's picture; "" for one inside of a table."""
        inside = self._place(row) is not None
        return "" if inside else os.path.join(self._roots[self._table(row)], self._path(row))

    def account(self) -> Account:
        return self._account

    def guesses(self) -> tuple[Guess, ...]:
        return self._guesses

    def _image(self, row: int) -> bytes:
        """The encoded picture of an example."""
        key = self._key(row)
        if (place := self._place(row)) is not None:
            container = self._containers[self._table(row)]
            assert container is not None  # it has a place in one
            self.limits.check_bytes(key, place[1])
            (image,) = read(container, [place])
            return image or b""
        if self._path(row).startswith(_MARK):
            raise BadSample(key, "the path of the picture is empty")
        file = self.file(row)
        stamp = self._stamps[row]
        self.limits.check_bytes(key, int(stamp[0]))
        try:
            return read_file(file, stamp)
        except OSError as error:
            raise BadSample(key, f"{file} cannot be read ({error.strerror})") from None

    def _table(self, row: int) -> int:
        """The number of the table that has an example."""
        return int(np.searchsorted(self._root_ends, self._entries[row], side="right"))

    def _place(self, row: int) -> tuple[int, int] | None:
        """Offset and size of an example's picture inside its table's container; None for a file."""
        if not len(self._places):
            return None
        offset, size = self._places[self._entries[row]].tolist()
        return (offset, size) if size >= 0 else None

    def _files(self) -> list[str]:
        """The file of each example's picture; "" for a picture that is inside a container."""
        tables = np.searchsorted(self._root_ends, self._entries, side="right").tolist()
        held = self._places[self._entries, 1] >= 0 if len(self._places) else np.zeros(len(self))
        return [
            "" if inside else os.path.join(self._roots[table], self._path(row))
            for row, (table, inside) in enumerate(zip(tables, held.tolist()))
        ]

    def _path(self, row: int) -> str:
        return cut(self._paths, self._path_ends, self._entries[row])

    def _key(self, row: int) -> str:
        return self._path(row).removeprefix(_MARK).removeprefix(self._folder)


class _Reader:
    """Reads tables into rows, with the layout that their first rows have."""

    def __init__(self, table: Table):
        column, _, wanted = (part.strip() for part in table.where.partition("="))
        if table.where and not (column and wanted):
            raise DataError(f"where={table.where!r}: expected column=value")
        captions = (table.captions,) if isinstance(table.captions, str) else table.captions
        self._table, self._column, self._wanted = table, column, wanted
        self.image, self.captions = table.image, tuple(filter(None, captions))
        self.rows, self.guesses = Rows(), dict[str, Guess]()
        self._values: dict[str, None] = {}  # of the column of `where`
        self._counts = collections.Counter[str]()  # rows by unit; those that `where` leaves out: ""
        self._tally = Tally()  # of what the tables leave out

    def read(self, file: File) -> None:
        """Adds the rows of one table."""
        table = self._table
        layout = inference.layout(
            file,
            image=self.image,
            captions=self.captions,
            label=table.label,
            where=self._column,
            root=table.root,
        )
        self.image, self.captions = layout.image, layout.captions
        self._note(file, layout)
        held = None
        if layout.inside and isinstance(file, Columnar):
            held = file.pictures(self.image)
        names = [*self.captions, *filter(None, (table.label, self._column))]
        image = [] if held else [self.image]
        rows = file.rows([*image, *names]) if image or names else _numbered(held)
        rows = self._kept(file, rows)
        start = list(itertools.islice(rows, _LOOKED_AT))
        written = [self._written(file, held, number, cells) for number, cells in start]
        spelling = paths.find(file.path, table.root, [path for path in written if path])
        self._note_spelling(spelling, written)
        self.rows.start_file(spelling.root, held.file if held else "")
        for number, cells in itertools.chain(start, rows):
            path = self._written(file, held, number, cells)
            self._add(file, held, number, spelling.path(path) if path else "", cells)

    def _add(
        self, file: File, held: Pictures | None, number: int, path: str, cells: list[Any]
    ) -> None:
        cells = cells if held else cells[1:]
        texts = _words(file, number, self.captions, cells)
        label = _one(cells[len(self.captions)]) if self._table.label else ""
        empty = f"{_MARK}{os.path.basename(file.path)} {file.unit} {number}"
        if held is None or held.places[number - 1][1] == ABSENT:
            self.rows.add(paths.normal(path) if path else empty, texts, label)
            return
        (offset, size), check = held.places[number - 1].tolist(), held.checks[number - 1]
        name = held.paths[number - 1]
        self.rows.add(name or empty, texts, label, (offset, size), f"{check} {size}\0{name}")

    def _written(self, file: File, held: Pictures | None, number: int, cells: list[Any]) -> str:
        """The path of a row's picture as the table has it; '' for none, and for one that is held
        in the table."""
        if held is None:
            return _path(file, number, self.image, cells[0])
        return held.paths[number - 1] if held.places[number - 1][1] == ABSENT else ""

    def _kept(
        self, file: File, rows: Iterator[tuple[int, list[Any]]]
    ) -> Iterator[tuple[int, list[Any]]]:
        """The rows that `where` keeps. Counts all of them."""
        for number, cells in rows:
            self._counts[file.unit] += 1
            if self._column:
                value = _one(cells[-1])
                if len(self._values) < 1000:
                    self._values.setdefault(value)
                if value != self._wanted:
                    self._counts[""] += 1
                    continue
            yield number, cells

    def _note(self, file: File, layout: inference.Layout) -> None:
        """Keeps what is inferred about a table, and what it leaves out."""
        guesses = list(layout.guesses)
        if isinstance(file, Csv):
            if not self._table.separator:
                reason = "it divides the rows into cells of equal number"
                guesses.append(Guess("separator", spelt(file.separator), reason))
            if not self._table.quotes and file.quotes == "letters":
                reason = "as quotes around cells they would swallow rows or be damaged"
                guesses.append(Guess("quotes", "letters", reason))
        for guess in guesses:
            self.guesses.setdefault(guess.field, guess)
        for one in file.skipped():
            self._tally.add(one.reason, *one.examples, count=one.count)

    def _note_spelling(self, spelling: paths.Spelling, written: list[str]) -> None:
        """Keeps that paths are found under another spelling than the table's."""
        changed = [path for path in written if path and spelling.changes(path)]
        if changed:
            guess = self.guesses.get("image", Guess("image", self.image, "as it is set"))
            reason = f"{changed[0]} is found as {spelling.path(changed[0])}"
            where = f" in {spelling.root}" if spelling.root else ""
            self.guesses["image"] = guess._replace(reason=f"{guess.reason}; {reason}{where}")

    def account(self) -> Account:
        """What became of every row of the tables."""
        skipped, others = self._tally.skipped(), self._counts.pop("", 0)
        read_ = self._counts.total()
        unit = "lines" if set(self._counts) == {"line"} else "rows"
        found = read_ + sum(s.count for s in skipped)
        if others:
            reason = f"other rows than where={self._table.where}"
            skipped = (*skipped, Skipped(reason, others, ()))
        return Account(unit, found, read_ - others, skipped)

    def nothing(self) -> DataError:
        """The error for tables without a row to read."""
        name = self._table.path if isinstance(self._table.path, str) else self._table.path[0]
        if not self._values:
            return DataError(f"{name}: no rows")
        listed = ", ".join(map(repr, itertools.islice(self._values, _SHOWN)))
        more = " and more" if len(self._values) > _SHOWN else ""
        return DataError(
            f"{name}: no row has {self._table.where}; the values of {self._column} are "
            f"{listed}{more}"
        )


def _numbered(held: Pictures | None) -> Iterator[tuple[int, list[Any]]]:
    """Rows without cells, for a table of which only the pictures are read."""
    count = len(held.places) if held else 0
    return ((number, []) for number in range(1, count + 1))


def _one(cell: Any) -> str:
    """The value of a cell as one string."""
    return ", ".join(strings(cell) or ())


def _path(file: File, number: int, column: str, cell: Any) -> str:
    """The path in a cell; '' if the cell is empty."""
    values = strings(cell)
    if values is None or len(values) > 1:
        kind = type(cell).__name__
        raise DataError(
            f"{file.path}: {file.unit} {number}: column {column} holds a {kind}, expected a path"
        )
    return values[0] if values else ""


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
