"""Threads over the rows of a data set, and how far something is."""

from __future__ import annotations

import concurrent.futures
import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Self, TypeVar

from tqdm import tqdm

from clipx.data import pictures

_CHUNK = 32  # rows per work item of a thread
_AHEAD = 8  # work items per thread that may be finished ahead of their turn
_SILENT = 10.0  # seconds without a line, at most, where there is no terminal
_POLL = 0.5  # seconds between two looks at a count
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


class Lines:
    """In place of a bar where there is no terminal: a line on stderr each ten seconds. It has what
    is used of a bar: `n`, `total`, `update`, `refresh`, and that it is a context."""

    def __init__(self, total: int | None, what: str, unit: str):
        self.n, self.total, self._what, self._unit = 0, total, what, unit
        self._first = self._told = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, count: int = 1) -> None:
        self.n += count
        self.refresh()

    def refresh(self) -> None:
        now = time.monotonic()
        if now - self._told < _SILENT:
            return
        self._told, seconds = now, now - self._first
        words = [f"{tqdm.format_interval(seconds)} so far"]
        if self.total and self.n:
            words.insert(0, f"{self.n:,}/{self.total:,}{self._unit}")
            left = seconds * max(self.total - self.n, 0) / self.n
            words.append(f"about {tqdm.format_interval(left)} left")
        elif self.n:
            words.insert(0, f"{self.n:,}{self._unit}")
        print(f"{self._what}: {', '.join(words)}", file=sys.stderr, flush=True)


def progress_bar(
    total: int | None, what: str, unit: str = " rows", *, leave: bool = True
) -> tqdm | Lines:
    """A progress bar on a terminal, with the time that is left; elsewhere a line each ten seconds.
    leave: whether the bar stays when it is done."""
    if not sys.stderr.isatty():
        return Lines(total, what, unit)
    delay = 0 if leave else 2.0
    return tqdm(total=total, desc=what, unit=unit, dynamic_ncols=True, leave=leave, delay=delay)


@contextlib.contextmanager
def shown(
    what: str,
    count: Callable[[], int] | None = None,
    total: int | None = None,
    *,
    unit: str = " rows",
    silent: bool = False,
) -> Iterator[None]:
    """Context of something that takes time: shows, from a thread, how long it has taken, and how
    far it is if `count` tells. silent: shows nothing, as the other processes of a run do."""
    if silent:
        yield
        return
    over = threading.Event()

    def poll() -> None:
        with progress_bar(total, what, unit, leave=False) as bar:
            while not over.wait(_POLL):
                done = count() if count else 0
                done = min(done, total) if total else done
                bar.update(done - bar.n) if done > bar.n else bar.refresh()

    thread = threading.Thread(target=poll, name=f"progress of {what}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
