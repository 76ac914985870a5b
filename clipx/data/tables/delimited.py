"""Reads csv, tsv and other files of cells with a separator between them."""

from __future__ import annotations

import collections
import csv
import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from clipx.data.base import Skipped
from clipx.data.tables.cells import brief, cleaned, has_picture_end
from clipx.data.tables.lines import lines
from clipx.data.tables.separators import SEPARATORS, first_row, reader, spelt, split, widths_of
from clipx.errors import DataError, data_flag

_LOOKED_AT = 100  # rows from which to infer the separator and what a row looks like
_SHOWN = 3  # damaged rows to name
_TOLERATED = 0.05  # share of damaged rows to leave out; a file with more is refused
_SHAPES = 5  # a column of names or ids has few shapes


class Csv:
    """A file of cells with separators.

    A quoted cell may contain separators, line breaks and doubled quotes. Quotes are letters in a
    file where they cannot be read so, or where a quoted cell would swallow lines that look like
    rows, if every line is a row without them.

    The first line has the names of the columns. If it is a row, they are column_1, column_2 and
    so on. A few rows with another number of cells are left out and counted; more raise `DataError`.
    """

    unit = "line"

    def __init__(self, path: str, separator: str = "", quotes: str = ""):
        """`separator`: one character, or '' to infer it; `quotes`: as `Table.quotes`."""
        self.path = path
        start = [line for line in itertools.islice(lines(path), _LOOKED_AT) if line.strip()]
        if not start:
            raise DataError(f"{path}: an empty file, expected a first line with column names")
        widths = widths_of(start)
        best = max(SEPARATORS, key=lambda s: widths[s])
        self.separator = separator or best
        first = first_row(start, self.separator)
        if len(first) < 2:
            raise self._one_column(start, first[0], best, widths[best] > (0, 1))
        self._rows_look = _Look.of(start[1:], self.separator, len(first))
        self.header = not _is_row(first, self._rows_look, start[1:], self.separator)
        self.columns = first if self.header else [f"column_{i + 1}" for i in range(len(first))]
        self.quotes, self._survey = self._find_quotes(quotes)

    def rows(self, names: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
        indices = [self.columns.index(name) for name in names]
        for row in self._records(self.quotes):
            if row.cells is not None:
                yield row.line, [row.cells[index] for index in indices]

    def skipped(self) -> list[Skipped]:
        """The rows that `rows` leaves out."""
        counted = (
            (f"another number of cells than {len(self.columns)}", self._survey.damaged),
            ("the names of the columns once more", self._survey.headers),
        )
        return [
            Skipped(reason, len(found), tuple(f"line {line}" for line in found[:_SHOWN]))
            for reason, found in counted
            if found
        ]

    def _records(self, quotes: str) -> Iterator[_Record]:
        """All rows but blank ones. Ends with a record of height 0 where cells cannot be told
        apart."""
        width, line, first = len(self.columns), 1, self.header
        records = reader(lines(self.path), self.separator, quotes)
        while True:
            try:
                cells = next(records, None)
            except csv.Error as error:
                yield _Record(line, None, [str(error)], 0)
                return
            if cells is None:
                return
            start, line = line, records.line_num + 1
            if any(cells[width:]) or len(cells) < width:
                if "".join(cells).strip():
                    yield _Record(start, None, cells, line - start)
            elif first:
                first = False
            elif self.header and [cleaned(cell) for cell in cells[:width]] == self.columns:
                yield _Record(start, None, [], 1)
            else:
                yield _Record(start, cells[:width], cells, line - start)

    def _find_quotes(self, given: str) -> tuple[str, _Survey]:
        """(how to read quotes: "cells" or "letters", what reading them so finds).

        Raises `DataError` if neither fits, or what is given does not.
        """
        if given:
            survey = _Survey.of(self._records(given), self._rows_look)
            if not dataclasses.replace(survey, swallowed=None).sound:
                raise self._refused(dataclasses.replace(survey, swallowed=None))
            return given, survey
        cells = _Survey.of(self._records("cells"), self._rows_look)
        if cells.sound and not cells.damaged:
            return "cells", cells
        letters = _Survey.of(self._records("letters"), self._rows_look)
        better = not cells.sound or len(letters.damaged) < len(cells.damaged)
        if letters.sound and better and not self._meant_as_cells(letters):
            return "letters", letters
        if cells.sound:
            return "cells", cells
        raise self._refused(cells)

    def _meant_as_cells(self, letters: _Survey) -> bool:
        """Whether quotes enclose cells of this file, although some are wrong: half of the rows have
        a quoted cell, or a row only has the right number of cells if quotes enclose them."""
        width, enclosed = len(self.columns), 0
        for line in lines(self.path):
            if '"' not in line:
                continue
            cells = next(split([line], self.separator, "cells"), [])
            plain = next(split([line], self.separator, "letters"), [])
            if len(cells) == width and (len(plain) != width or _doubled(plain)):
                return True
            enclosed += any(_enclosed(cell) for cell in plain)
        return enclosed * 2 >= max(letters.rows, 1)

    def _refused(self, cells: _Survey) -> DataError:
        """The error for a file that can be read in neither way."""
        if cells.broken is not None:
            line, reason = cells.broken
            return DataError(
                f"{self.path}: line {line}: {reason}; the file is truncated, or a quote in this "
                "line is not closed or not doubled"
            )
        if cells.swallowed is not None:
            line, height = cells.swallowed
            return DataError(
                f"{self.path}: line {line}: a quote opens here and closes {height - 1} lines "
                "later, and lines between them look like rows; remove it or double it, or set "
                "--config.data.quotes=cells if these lines are one caption"
            )
        line, count = cells.damaged[0], len(cells.first_damaged)
        return DataError(
            f"{self.path}: line {line} has {count} cells, expected {len(self.columns)} "
            f"({', '.join(map(brief, self.columns))}); the line is damaged, or a "
            f"{spelt(self.separator)!r} inside a cell is not quoted"
        )

    def _one_column(self, start: list[str], first: str, best: str, another: bool) -> DataError:
        problem = f"{self.path}: one column, {brief(first)!r}"
        if another:
            names = ", ".join(brief(name) for name in first_row(start, best))
            return DataError(
                f"{problem}, with separator {spelt(self.separator)!r}; separator "
                f"{spelt(best)!r} gives the columns {names}; "
                f"set {data_flag('separator', spelt(best))}"
            )
        return DataError(
            f"{problem}, expected a column of pictures and one of captions; if the file has "
            "both, set the character between them: --config.data.separator=..."
        )


class _Record(NamedTuple):
    line: int  # the number of its first line
    cells: list[str] | None  # None for a row to leave out
    found: list[str]  # its cells as they are; [] for the names of the columns once more
    height: int  # in lines; 0 for the error at which reading stopped


class _Look(NamedTuple):
    """What a line must look like to be a row: its width, and its columns of names or ids."""

    separator: str
    width: int
    # the shapes of each such column; none for paths of pictures; None for those with blanks
    columns: dict[int, frozenset[str] | None]

    @classmethod
    def of(cls, start: Sequence[str], separator: str, width: int) -> _Look:
        quoted = [row for row in split(start, separator, "cells") if "\n" not in "".join(row)]
        plain = list(split(start, separator, "letters"))
        # where a quote swallows most of the file, its lines tell more than its rows
        rows = quoted if len(quoted) * 4 >= len(plain) else plain
        rows, columns = [row for row in rows if len(row) == width], {}
        for i in range(width):
            cells = [cleaned(row[i]) for row in rows]
            if cells and sum(map(has_picture_end, cells)) >= 0.9 * len(cells):
                columns[i] = None if any(" " in cell for cell in cells) else frozenset()
                continue
            shapes = collections.Counter(map(_shape, cells)).most_common(_SHAPES)
            known = {shape for shape, _ in shapes if " " not in shape and "0" in shape}
            if cells and sum(n for shape, n in shapes if shape in known) >= 0.9 * len(cells):
                columns[i] = frozenset(known)
        return cls(separator, width, columns)

    def fits(self, row: Sequence[str]) -> bool:
        """Whether cells look like those of a row."""
        if not self.columns or len(row) != self.width:
            return False
        for i, shapes in self.columns.items():
            cell = cleaned(row[i])
            if shapes and _shape(cell) not in shapes:
                return False
            if not shapes and not has_picture_end(cell):
                return False
            if shapes is not None and " " in cell:
                return False
        return True

    def swallowed(self, cell: str) -> bool:
        """Whether a later line of a quoted cell looks like a row, or like a row's start."""
        inner = cell.split("\n")[1:]
        if not inner or not self.columns:
            return False
        return any(self.fits(row) for row in split(inner, self.separator, "letters"))


@dataclasses.dataclass
class _Survey:
    """What a pass over all rows finds."""

    rows: int = 0
    damaged: list[int] = dataclasses.field(default_factory=list)  # their lines
    first_damaged: list[str] = dataclasses.field(default_factory=list)  # the cells of the first
    headers: list[int] = dataclasses.field(default_factory=list)
    swallowed: tuple[int, int] | None = None  # line and height of a cell with rows inside
    broken: tuple[int, str] | None = None  # line and reason

    @classmethod
    def of(cls, records: Iterable[_Record], look: _Look) -> _Survey:
        survey = cls()
        for line, cells, found, height in records:
            if not height:
                survey.broken = line, found[0]
            elif cells is not None:
                survey.rows += 1
            elif found:
                survey.damaged.append(line)
                survey.first_damaged = survey.first_damaged or found
            else:
                survey.headers.append(line)
            if height > 1 and survey.swallowed is None and any(map(look.swallowed, found)):
                survey.swallowed = line, height
        return survey

    @property
    def sound(self) -> bool:
        """Whether the rows can be read, without a few damaged ones."""
        few = len(self.damaged) <= _TOLERATED * (self.rows + len(self.damaged))
        return few and self.swallowed is None and self.broken is None


def _shape(cell: str) -> str:
    """A cell with each run of digits (and letters among them) as 0, and of letters as a."""
    # one pattern for both: to look for a digit from every letter of a long word takes minutes
    return re.sub(r"[^\W_]+", lambda word: "0" if re.search(r"\d", word[0]) else "a", cell)


def _is_row(first: list[str], look: _Look, start: list[str], separator: str) -> bool:
    """Whether the first line is a row: it has a picture's path, or a name shaped like others."""
    if any(map(has_picture_end, first)):
        return True
    others = [r for r in split(start, separator, "letters") if len(r) == len(first)]
    return len(others) > 1 and bool(look.columns) and look.fits(first)


def _enclosed(cell: str) -> bool:
    cell = cell.strip()
    return len(cell) > 1 and cell[0] == cell[-1] == '"'


def _doubled(cells: Iterable[str]) -> bool:
    return any(_enclosed(cell) and '""' in cell.strip()[1:-1] for cell in cells)
