"""Splits lines at separators: which character separates cells, and how quotes are read."""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Iterable, Iterator
from typing import Any

from clipx.data.tables.cells import cleaned
from clipx.errors import DataError

SEPARATORS = (",", "\t", ";", "|")
_HIGHEST = 2  # line breaks in the name of a column


def spelt(separator: str) -> str:
    """A separator as a config has it."""
    return "tab" if separator == "\t" else separator


def separator_of(given: str) -> str:
    """The separator that a config has: one character or "tab"; '' infers it."""
    separator = {"tab": "\t", "\\t": "\t"}.get(given, given)
    if len(separator) > 1:
        raise DataError(
            f"separator={separator!r}: expected one character or tab, or '' to infer it"
        )
    return separator


def reader(rows: Iterable[str], separator: str, quotes: str, *, strict: bool = True) -> Any:
    """A csv reader; `quotes` is "cells" or "letters"."""
    return csv.reader(
        rows,
        delimiter=separator,
        quoting=csv.QUOTE_NONE if quotes == "letters" else csv.QUOTE_MINIMAL,
        skipinitialspace=True,
        strict=strict,
    )


def split(rows: Iterable[str], separator: str, quotes: str) -> Iterator[list[str]]:
    """The cells of each row, without rows that cannot be split."""
    records = reader(rows, separator, quotes)
    while True:
        try:
            cells = next(records, None)
        except csv.Error:
            continue
        if cells is None:
            return
        yield cells


def first_row(start: list[str], separator: str) -> list[str]:
    """The cells of the first line. A quote in it that does not close there is a letter."""
    for quotes in ("cells", "letters"):
        with contextlib.suppress(csv.Error):
            first = next(filter(None, reader(start, separator, quotes, strict=False)), [""])
            if not any(cell.count("\n") > _HIGHEST for cell in first):
                return [cleaned(name) for name in first]
    return [cleaned(name) for name in start[0].split(separator)]


def widths_of(start: list[str]) -> dict[str, tuple[float, int]]:
    """How well each separator fits, with quotes around cells; where none does, with quotes as
    letters."""
    widths = {s: _width(start, s, "cells") for s in SEPARATORS}
    if max(widths.values())[0] < 0.9:
        widths = {s: max(widths[s], _width(start, s, "letters")) for s in SEPARATORS}
    return widths


def _width(rows: list[str], separator: str, quotes: str) -> tuple[float, int]:
    """How well a separator fits: (share of rows with as many cells as the first, that number).

    (0, 1) if it does not split the first row.
    """
    records = reader(rows, separator, quotes, strict=False)
    try:
        widths = [len(cells) for cells in records if cells]
    except csv.Error:
        return 0, 1
    return (widths.count(widths[0]) / len(widths), widths[0]) if widths[0] > 1 else (0, 1)
