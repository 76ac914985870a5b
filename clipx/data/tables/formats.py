"""Tables on disk as named columns: csv, tsv, jsonl and parquet, read in order, row by row."""

from __future__ import annotations

import ast
import codecs
import csv
import itertools
import json
import os
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

from clipx.data.storage import expand, is_remote
from clipx.errors import DataError, optional

SEPARATORS = (",", "\t", ";", "|")
PICTURE_ENDS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
_LOOKED_AT = 100  # rows, to tell a separator or the keys of json lines
_BATCH = 1024  # rows of a parquet file that are Python objects at once

# Each kind of file has `path`, its `columns`, what it calls a `unit`, and `rows(names)`, which
# gives the number of each row in the file and its cells in these columns.


class Csv:
    """Cells between separators. A quoted cell may hold separators, line breaks and doubled quotes.

    Every row has as many cells as the header: one with more or fewer raises `DataError`, because
    a file with such a row is cut, or its quotes are not what they seem. In a tab-separated file
    that cannot be read so, quotes are letters like others.
    """

    unit = "line"

    def __init__(self, path: str, separator: str):
        self.path, self._quoting = path, csv.QUOTE_MINIMAL
        start = list(itertools.islice(_lines(path), _LOOKED_AT))
        if not "".join(start).strip():
            raise DataError(f"{path}: an empty file, expected a line with the names of columns")
        widths = {s: _width(start, s) for s in SEPARATORS}
        best = max(SEPARATORS, key=lambda s: widths[s])
        self.separator = separator or best
        self.columns = _header(start, self.separator)
        if len(self.columns) < 2:
            found = f"{path}: one column, {self.columns[0]!r}"
            if widths[best] > (0, 1):
                names = ", ".join(_header(start, best))
                raise DataError(
                    f"{found}, at separator {_spelt(self.separator)!r}; {_spelt(best)!r} makes it "
                    f"{names}; set --config.data.separator={shlex.quote(_spelt(best))}"
                )
            expected = "one with pictures and one with captions"
            raise DataError(
                f"{found}, expected {expected}; if they are there, name what stands between them: "
                "--config.data.separator=..."
            )
        if any(name.lower().endswith(PICTURE_ENDS) for name in self.columns):
            raise DataError(
                f"{path}: the first line ({', '.join(self.columns)}) is a row, expected the names "
                f"of the columns; add a line such as filepath{self.separator}caption"
            )
        if self.separator == "\t" and not self._regular():
            self._quoting = csv.QUOTE_NONE
            if not self._regular():  # then the fault is another, to be told as it is
                self._quoting = csv.QUOTE_MINIMAL

    def rows(self, names: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
        places = [self.columns.index(name) for name in names]
        for line, cells in self._records():
            yield line, [cells[place] for place in places]

    def _records(self) -> Iterator[tuple[int, list[str]]]:
        width, line = len(self.columns), 1
        reader = csv.reader(
            _lines(self.path),
            delimiter=self.separator,
            quoting=self._quoting,
            skipinitialspace=True,
            strict=True,
        )
        try:
            for number, cells in enumerate(reader):
                if len(cells) != width and "".join(cells).strip():
                    raise DataError(
                        f"{self.path}: line {line} has {len(cells)} cells, expected {width} "
                        f"({', '.join(self.columns)}); the file is damaged there, or a "
                        f"{_spelt(self.separator)!r} inside a cell is not in quotes"
                    )
                if number and len(cells) == width:
                    yield line, cells
                line = reader.line_num + 1
        except csv.Error as error:
            raise DataError(
                f"{self.path}: line {line}: {error}; the file is cut, or a quote in the cells of "
                "that line is not closed or not doubled"
            ) from None

    def _regular(self) -> bool:
        try:
            for _ in self._records():
                pass
        except DataError:
            return False
        return True


class JsonLines:
    """One JSON object a line. `columns` are the keys of the first hundred."""

    unit = "line"

    def __init__(self, path: str):
        self.path = path
        start = [value for _, value in itertools.islice(self._objects(), _LOOKED_AT)]
        self.columns = list(dict.fromkeys(itertools.chain.from_iterable(start)))
        if not start:
            raise DataError(f"{path}: an empty file, expected a JSON object a line")

    def rows(self, names: Sequence[str]) -> Iterator[tuple[int, list[Any]]]:
        for line, value in self._objects():
            yield line, [value.get(name) for name in names]

    def _objects(self) -> Iterator[tuple[int, dict]]:
        for line, text in enumerate(_lines(self.path), 1):
            if not text.strip():
                continue
            if line == 1 and text.lstrip().startswith("["):
                raise DataError(
                    f"{self.path}: a JSON list, expected an object a line; "
                    f"jq -c '.[]' {shlex.quote(self.path)} writes them so"
                )
            try:
                value = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{self.path}: line {line} is not JSON ({error})") from None
            if not isinstance(value, dict):
                found = type(value).__name__
                raise DataError(f"{self.path}: line {line} is a {found}, expected a JSON object")
            yield line, value


class Parquet:
    """A parquet file, read through pyarrow."""

    unit = "row"

    def __init__(self, path: str):
        with optional("parquet", DataError, f"{path}: parquet needs pyarrow"):
            import pyarrow
            import pyarrow.parquet
        self.path, self._parquet, self._error = path, pyarrow.parquet, pyarrow.ArrowException
        with self._open() as file:
            self.columns = list(file.schema_arrow.names)

    def rows(self, names: Sequence[str]) -> Iterator[tuple[int, list[Any]]]:
        number = 0
        with self._open() as file:
            batches = file.iter_batches(_BATCH, columns=list(names))
            while True:
                try:
                    batch = next(batches, None)
                except (self._error, OSError) as error:
                    raise self._damaged(error) from None
                if batch is None:
                    return
                for cells in zip(*(batch.column(name).to_pylist() for name in names)):
                    number += 1
                    yield number, list(cells)

    def _open(self):
        try:
            return self._parquet.ParquetFile(self.path)
        except (self._error, OSError) as error:
            raise self._damaged(error) from None

    def _damaged(self, error: Exception) -> DataError:
        said = str(error).replace("\n", " ")
        return DataError(f"{self.path}: cannot be read as parquet ({said})")


File = Csv | JsonLines | Parquet
_KINDS = {
    (".csv", ".tsv", ".txt"): Csv,
    (".jsonl", ".ndjson", ".json"): JsonLines,
    (".parquet", ".pq"): Parquet,
}


def tables(paths: str | Sequence[str], separator: str) -> Iterator[File]:
    """The tables that the patterns name, in order, each opened. What is wrong with one is a
    `DataError`."""
    separator = {"tab": "\t", "\\t": "\t"}.get(separator, separator)
    if len(separator) > 1:
        raise DataError(
            f"separator={separator!r}: expected one character or tab, or nothing to have it found"
        )
    patterns = (paths,) if isinstance(paths, str) else paths
    files = list(itertools.chain.from_iterable(map(expand, patterns)))
    if not files:
        raise DataError("data path: nothing given, expected a table, a glob or several")
    for path, *_ in files:
        if is_remote(path) or os.path.isdir(path):
            kind = "not on a disk of this machine" if is_remote(path) else "a folder"
            raise DataError(f"{path}: {kind}, expected a table that is a local file")
        for ends, kind in _KINDS.items():
            if path.lower().endswith(ends):
                yield kind(path, separator) if kind is Csv else kind(path)
                break
        else:
            packed = "unpack it first, " if path.endswith((".gz", ".zip", ".zst", ".bz2")) else ""
            ends = ", ".join(itertools.chain.from_iterable(_KINDS))
            raise DataError(f"{path}: {packed}expected a table that ends in one of {ends}")


def strings(cell: Any) -> list[str] | None:
    """The strings in one cell, stripped and without NULs: itself, or those of a list, also where
    csv holds a list as text. None for what is neither, such as a picture's bytes."""
    if isinstance(cell, str):
        cell = cell.replace("\0", "").strip()
        if cell[:2] in ('["', "['") and cell[-1] == "]":
            for parse in (json.loads, ast.literal_eval):
                try:
                    found = parse(cell)
                except (ValueError, SyntaxError, MemoryError, RecursionError):
                    continue
                if isinstance(found, list) and all(isinstance(text, str) for text in found):
                    return [text.replace("\0", "").strip() for text in found]
        return [cell]
    if cell is None or cell != cell:  # not a number, as pandas writes what is missing
        return []
    if isinstance(cell, (int, float)):
        return [str(int(cell)) if isinstance(cell, float) and cell.is_integer() else str(cell)]
    if isinstance(cell, list):
        found = [strings(one) for one in cell]
        return None if None in found else list(itertools.chain.from_iterable(found))
    return None


def _lines(path: str) -> Iterator[str]:
    """The lines of a UTF-8 file, with or without a mark at its start."""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    yield line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    wide = line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
                    kind = "utf-16" if wide and number == 1 else "latin1"
                    name = shlex.quote(os.path.basename(path))
                    raise DataError(
                        f"{path}: line {number} is not UTF-8 (byte {line[error.start]:#04x}); "
                        f"if it is {kind}: iconv -f {kind} -t utf-8 {name} > new-{name}"
                    ) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def _header(lines: list[str], separator: str) -> list[str]:
    reader = csv.reader(lines, delimiter=separator, skipinitialspace=True)
    return [name.strip() for name in next(filter(None, reader))]


def _width(lines: list[str], separator: str) -> tuple[float, int]:
    """How well a separator fits: the share of rows as wide as the first, and that width. (0, 1)
    for one that does not part the first row."""
    reader = csv.reader(lines, delimiter=separator, skipinitialspace=True)
    try:
        widths = [len(cells) for cells in reader if cells]
    except csv.Error:
        return 0, 1
    return (widths.count(widths[0]) / len(widths), widths[0]) if widths[0] > 1 else (0, 1)


def _spelt(separator: str) -> str:
    return "tab" if separator == "\t" else separator
