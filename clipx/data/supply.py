"""Takes chunks of rows from the threads or processes that load them, and does not hang when those
cannot go on: a process that is killed, or a read that never ends, becomes an error with its cause.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Generic, NamedTuple, TypeVar, cast

import numpy as np

from clipx.data import activity
from clipx.data.worker import Workers
from clipx.errors import BadSample, DataError, RunError, StuckError

T = TypeVar("T")

_AHEAD = 2  # chunks that wait here; those that load keep more
_LOOK = 0.5  # seconds between two looks at the workers
_SILENCE = 2.0  # seconds in which the last chunks of a worker that has ended may still arrive
_LEAVE = 60.0  # seconds in which what loads ends when it is closed
_OURS = (BadSample, DataError, RunError)


class _Failed(NamedTuple):
    """The error with which the loading ended."""

    error: BaseException


class _Done(NamedTuple):
    """The end of the chunks."""


class Supply(Generic[T]):
    """The `count` chunks that an iterator gives, which a thread takes from it ahead of time.

    open: makes the iterator, in that thread. workers: the processes that it starts; None: threads
    of this process load. Next to the iterator's own errors, `next` raises `RunError` if a process
    has ended, and `StuckError` if nothing arrives because a wait has lasted `timeout` seconds.
    """

    def __init__(
        self, open: Callable[[], Iterator[T]], count: int, workers: Workers | None, timeout: float
    ):
        self._open, self._workers, self._timeout = open, workers, timeout
        self._left, self._begun = count, False
        self._ready: queue.Queue[T | _Failed | _Done] = queue.Queue(_AHEAD)
        self._stop, self._lost = threading.Event(), False
        self._thread = threading.Thread(target=self._take, name="clipx-supply", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        since = time.monotonic()
        while True:
            try:
                item = self._ready.get(timeout=_LOOK)
            except queue.Empty:
                self._check(time.monotonic() - since)
                continue
            if isinstance(item, _Done):
                raise StopIteration
            if isinstance(item, _Failed):
                if not isinstance(item.error, _OURS):
                    self._check_workers(only_failed=True)
                raise item.error
            self._left, self._begun = self._left - 1, True
            return cast(T, item)

    def close(self) -> None:
        """Ends the thread and the workers. Waits for them, unless they are lost."""
        self._stop.set()
        if self._lost and self._workers:
            self._workers.kill()
        with contextlib.suppress(queue.Empty):
            while True:
                self._ready.get_nowait()
        self._thread.join(_LOOK if self._lost else _LEAVE)
        if self._workers:
            self._workers.close()

    def _take(self) -> None:
        """Moves the chunks from the iterator into the queue."""
        iterator: Any = None
        try:
            with self._workers.starting() if self._workers else contextlib.nullcontext():
                iterator = self._open()
                for item in iterator:
                    self._put(item)
                    break  # all workers run
            for item in iterator:
                if not self._put(item):
                    break
            self._put(_Done())
        except BaseException as error:  # of any kind: the other thread raises it
            self._put(_Failed(error))
        finally:
            if iterator is not None:
                iterator.close()

    def _put(self, item: T | _Failed | _Done) -> bool:
        while not self._stop.is_set():
            with contextlib.suppress(queue.Full):
                self._ready.put(item, timeout=_LOOK)
                return True
        return False

    def _check(self, waited: float) -> None:
        """Raises what is wrong if nothing has arrived for so many seconds."""
        if waited > _SILENCE:
            self._check_workers()
        if waited < self._timeout:
            return
        longest = self._workers.stuck() if self._workers else activity.longest()
        if longest is not None and longest.seconds >= self._timeout:
            self._lost = True
            raise StuckError(
                f"no rows arrive: {longest.what} has not ended for {longest.seconds:.0f} s "
                f"(config.data.timeout={self._timeout:g}); mend the disk, the network or the file, "
                "then run the same command to continue"
            )
        if waited > 2 * self._timeout + _LEAVE:
            self._lost = True
            raise StuckError(
                f"no rows have arrived for {waited:.0f} s, twice config.data.timeout="
                f"{self._timeout:g} and more, and no single read is at fault; set a longer "
                "config.data.timeout if the storage is that slow"
            )

    def _check_workers(self, *, only_failed: bool = False) -> None:
        """Raises `RunError` if a worker has ended before its time."""
        if self._workers is None:
            return
        # the last chunks are near: workers that have none left end by themselves
        finished = only_failed or self._left < self._workers.count
        if died := self._workers.died(failed=finished):
            self._lost = True
            raise RunError(died + "; no rows had arrived yet" * (not self._begun))


class PictureArrays:
    """The pictures of the batches that load. Threads write their rows into the batch's one array,
    so that it need not be put together from copies."""

    def __init__(self, shape: tuple[int, ...]):
        """shape: of a batch's pictures."""
        self._shape, self._lock = shape, threading.Lock()
        self._arrays: dict[int, np.ndarray] = {}  # by step

    def rows(self, step: int, first: int, count: int) -> np.ndarray:
        """Where `count` rows of a step go."""
        with self._lock:
            if step not in self._arrays:
                self._arrays[step] = np.empty(self._shape, np.uint8)
            return self._arrays[step][first : first + count]

    def take(self, step: int) -> np.ndarray:
        """All pictures of a step, whose rows are loaded."""
        with self._lock:
            return self._arrays.pop(step)
