"""Opens tables: csv, tsv, json, jsonl, parquet and arrow files with named columns, row by row."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from clipx.data.storage import Shard, expand, is_remote, refuse_folder
from clipx.data.tables.columnar import Arrow, Parquet
from clipx.data.tables.delimited import Csv
from clipx.data.tables.documents import Json, JsonLines, open_json
from clipx.data.tables.separators import separator_of
from clipx.errors import DataError

# Every class of files has `path`, `columns`, `unit` (what an error calls a row), `rows(names)`,
# which yields the number of each row in the file and its cells in the columns `names`, and
# `skipped()`, what is part of no row.
File = Csv | JsonLines | Json | Parquet | Arrow
_DELIMITED = (".csv", ".tsv", ".txt", ".token")
_JSON = (".jsonl", ".ndjson", ".json")
_PARQUET, _ARROW = (".parquet", ".pq"), (".arrow",)
ENDS = (*_DELIMITED, *_JSON, *_PARQUET, *_ARROW)


def tables(paths: str | Sequence[str], separator: str = "", quotes: str = "") -> Iterator[File]:
    """Opens the tables that the patterns name, in order.

    `separator` is one character or "tab", `quotes` "cells" or "letters"; '' infers them. Raises
    `DataError` for a table that cannot be read.
    """
    separator = separator_of(separator)
    patterns = (paths,) if isinstance(paths, str) else paths
    files: list[Shard] = list(itertools.chain.from_iterable(map(expand, patterns)))
    if not files:
        raise DataError("data path: nothing given, expected a table, a glob or several")
    for path, *_ in files:
        yield open_table(path, separator, quotes)


def open_table(path: str, separator: str = "", quotes: str = "") -> File:
    """The reader for one file, by the ending of its name."""
    if is_remote(path):
        raise DataError(f"{path}: a remote path, expected a table that is a local file")
    refuse_folder(path, "a table that is a local file")
    name = path.lower()
    if name.endswith(_DELIMITED):
        return Csv(path, separator, quotes)
    if name.endswith(_JSON):
        return open_json(path)
    if name.endswith(_PARQUET):
        return Parquet(path)
    if name.endswith(_ARROW):
        return Arrow(path)
    fix = "; decompress it" if path.endswith((".gz", ".zip", ".zst", ".bz2")) else ""
    raise DataError(f"{path}: expected a file name that ends in one of {', '.join(ENDS)}{fix}")
