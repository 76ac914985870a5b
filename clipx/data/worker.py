"""The processes that load data: how they start, what they run, and what became of them.

This file is also the main script of the workers, in place of the command that started them. A
worker that ran the command's script would import JAX, and so would grain if JAX is installed. That
costs a second or two and its memory in every worker, and loading does not need JAX.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import signal
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from typing import Any

from clipx.data.activity import Waiting, longest

_OFTEN = 5.0  # seconds between two looks of a worker at itself, at most
_STARTS = 5.0  # seconds in which all workers have started once one of them delivers
_NOTE = ".waiting"  # ending of the file in which a worker says what it waits for
_CRASHED = (
    "a library that it uses crashed, most likely a decoder; python -m clipx.dataset verify, or "
    "config.data.workers=0, finds the row"
)
_CAUSES = {
    "SIGKILL": "most likely the kernel, for lack of memory (dmesg says so): set fewer "
    "config.data.workers, or give it more memory",
    "SIGBUS": "a file was cut while it was read, or /dev/shm is full (docker run --shm-size=16g)",
    "SIGSEGV": _CRASHED,
    "SIGABRT": _CRASHED,
    "SIGILL": _CRASHED,
    "SIGFPE": _CRASHED,
}
_ONE_AT_A_TIME = threading.Lock()  # loaders that start their workers: see `Workers.starting`
_OOM_COUNTS = ("/proc/vmstat", "/sys/fs/cgroup/memory.events")


class Shipped:
    """A function that workers read from a file, at their first call of it.

    The arguments of a new process go through a pipe. If a process dies before it has read more than
    the pipe holds, the writer waits for ever, so these must be small.
    """

    def __init__(self, function: Callable[[int], Any], folder: str):
        import cloudpickle  # grain's, which serialises with it too

        self._file = os.path.join(folder, "function")
        with open(self._file, "wb") as file:
            cloudpickle.dump(function, file)

    def __call__(self, index: int) -> Any:
        return self._function(index)

    def __reduce__(self):
        return _arrived, (self._file,)

    @functools.cached_property
    def _function(self) -> Callable[[int], Any]:
        import cloudpickle

        with open(self._file, "rb") as file:
            return cloudpickle.load(file)


def _arrived(file: str) -> Shipped:
    shipped = Shipped.__new__(Shipped)
    shipped._file = file
    return shipped


class Workers:
    """The `count` worker processes of one loader."""

    def __init__(self, count: int, timeout: float):
        """timeout: seconds after which a worker says what it waits for."""
        self.count, self._timeout = count, timeout
        self._folder = tempfile.TemporaryDirectory(prefix="clipx-workers-")
        self._processes: list[BaseProcess] = []
        self._entered: list[types.ModuleType] = []  # the main module while they start
        self._out_of_memory = _oom_kills()

    def ship(self, function: Callable[[int], Any]) -> Shipped:
        """The function, for the workers to call."""
        return Shipped(function, self._folder.name)

    @property
    def init(self) -> Callable[[int, int], None]:
        """What a worker calls first, with its number and the count of workers."""
        return functools.partial(_follow_parent, self._folder.name, self._timeout)

    @contextlib.contextmanager
    def starting(self) -> Iterator[None]:
        """Context in which new processes are workers: they run this file first, not the main
        script, and are watched from their first moment on. The main module and the way to start a
        process are the whole program's, so that one loader starts at a time: others wait until its
        workers run, or are killed or closed."""
        _ONE_AT_A_TIME.acquire()
        self._entered.append(self._enter())
        try:
            yield
            end = time.monotonic() + _STARTS
            while not self._started() and time.monotonic() < end:
                time.sleep(0.01)
        finally:
            self._leave()

    def _enter(self) -> types.ModuleType:
        """Puts something of its own in the place of both. Returns the main module."""
        context, main = multiprocessing.get_context("spawn"), sys.modules["__main__"]
        make = context.Process

        def recorded(*args: Any, **options: Any) -> BaseProcess:
            process = make(*args, **options)
            self._processes.append(process)
            return process

        replacement = types.ModuleType("__main__")
        replacement.__spec__ = __spec__
        sys.modules["__main__"] = replacement
        context.Process = recorded  # pyright: ignore[reportAttributeAccessIssue]
        return main

    def _leave(self) -> None:
        """Puts both back, once; any thread may."""
        try:
            main = self._entered.pop()
        except IndexError:
            return
        vars(multiprocessing.get_context("spawn")).pop("Process")  # the class has it
        sys.modules["__main__"] = main
        _ONE_AT_A_TIME.release()

    def _started(self) -> bool:
        processes = list(self._processes)
        return len(processes) == self.count and all(process.pid for process in processes)

    def died(self, *, failed: bool = False) -> str:
        """How a worker ended and why, in words; "" if none has. failed: only one that failed."""
        for process in list(self._processes):
            code = process.exitcode
            if code is not None and (code or not failed):
                return f"a data worker (process {process.pid}) {self._describe(code)}"
        return ""

    def _describe(self, code: int) -> str:
        if code >= 0:
            return f"ended by itself with exit code {code}; what it printed stands above"
        name = signal.Signals(-code).name
        cause = _CAUSES.get(name, "somebody, or the scheduler of this machine, stopped it")
        if name == "SIGKILL" and _oom_kills() > self._out_of_memory:
            cause = (
                "the kernel ran out of memory meanwhile: set fewer config.data.workers, or give "
                "it more memory"
            )
        return f"was ended by {name}: {cause}"

    def stuck(self) -> Waiting | None:
        """The longest wait of a worker of which it has written; None if none has lasted long."""
        waits = []
        for note in pathlib.Path(self._folder.name).glob(f"*{_NOTE}"):
            seconds, _, what = note.read_text("utf-8", "surrogateescape").partition(" ")
            waits.append(Waiting(float(seconds), what))
        return max(waits, default=None)

    def kill(self) -> None:
        """Ends the workers at once."""
        for process in self._processes:
            if process.exitcode is None and process.pid is not None:
                process.kill()
        self._leave()

    def close(self) -> None:
        """Removes the files of the workers, which have ended."""
        self._leave()
        self._folder.cleanup()


def _oom_kills() -> int:
    """How many processes the kernel has ended so far for lack of memory."""
    count = 0
    for path in _OOM_COUNTS:
        with contextlib.suppress(OSError, ValueError), open(path) as file:
            lines = (line.split() for line in file)
            count += sum(int(line[1]) for line in lines if line[0] == "oom_kill")
    return count


def _follow_parent(folder: str, timeout: float, index: int, count: int) -> None:
    """Makes this worker exit when its parent process ends, even if the parent is killed. A wait
    that lasts longer than `timeout` seconds is written to a file of `folder`."""
    parent = multiprocessing.parent_process()
    assert parent  # this runs in a worker
    note = pathlib.Path(folder, f"{index}{_NOTE}")

    def watch() -> None:
        while not multiprocessing.connection.wait([parent.sentinel], min(timeout / 4, _OFTEN)):
            wait = longest()
            with contextlib.suppress(OSError):  # the parent has removed the folder
                if wait is None or wait.seconds < timeout:
                    note.unlink(missing_ok=True)
                    continue
                unfinished = note.with_suffix(".new")
                text = f"{wait.seconds} {wait.what}"
                unfinished.write_text(text, "utf-8", "surrogateescape")
                unfinished.replace(note)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__mp_main__":
    # makes `import jax` fail, which grain accepts
    sys.modules.setdefault("jax", None)  # pyright: ignore[reportArgumentType]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command handles Ctrl-C
    logging.disable(logging.WARNING)  # grain warns that JAX is missing
    import grain  # noqa: F401

    logging.disable(logging.NOTSET)
