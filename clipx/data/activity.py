"""What each thread of this process is waiting for, so that a wait that never ends has a name."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

_current: dict[int, tuple[float, str]] = {}  # by thread: since when, and what


class Waiting(NamedTuple):
    """The longest wait of this process."""

    seconds: float
    what: str


@contextlib.contextmanager
def doing(what: str) -> Iterator[None]:
    """Context in which this thread is at `what`, such as "reading FILE". Contexts nest."""
    thread = threading.get_ident()
    before = _current.get(thread)
    _current[thread] = time.monotonic(), what
    try:
        yield
    finally:
        if before is None:
            del _current[thread]
        else:
            _current[thread] = before


def longest() -> Waiting | None:
    """What a thread has been at for the longest time; None if all are idle."""
    now = time.monotonic()
    waits = [Waiting(now - since, what) for since, what in list(_current.values())]
    return max(waits, default=None)
