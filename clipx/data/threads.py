"""Threads over the rows of a data set."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from tqdm import tqdm

from clipx.data import pictures

_CHUNK = 32  # rows per work item of a thread
_AHEAD = 8  # work items per thread that may be finished ahead of their turn
_Result = TypeVar("_Result")


def in_order(
    function: Callable[[int], _Result], rows: int, progress: Callable[[int], Any] | None = None
) -> Iterator[_Result]:
    """Yields `function(row)` of every row, in order, computed by threads some hundred rows ahead.

    `progress(n)` is called after every n rows.
    """
    threads = pictures.threads()
    span = threads * _AHEAD * _CHUNK
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for start in range(0, rows, span):
            stop = min(start + span, rows)
            chunks = [range(i, min(i + _CHUNK, stop)) for i in range(start, stop, _CHUNK)]
            for results in pool.map(lambda chunk: [function(row) for row in chunk], chunks):
                yield from results
                if progress:
                    progress(len(results))


def progress_bar(total: int, what: str, unit: str = " rows") -> tqdm:
    """A progress bar, shown only if stderr is a terminal."""
    return tqdm(total=total, desc=what, unit=unit, dynamic_ncols=True, disable=None)
