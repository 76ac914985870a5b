"""The main script of data workers, in place of the command that started them.

A worker that ran the command's script would import JAX, and so would grain if JAX is installed.
That costs a second or two and its memory in every worker, and loading does not need JAX.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import types
from collections.abc import Iterator


@contextlib.contextmanager
def light_main() -> Iterator[None]:
    """Context in which new processes run this file first, not the main script."""
    main = sys.modules["__main__"]
    replacement = types.ModuleType("__main__")
    replacement.__spec__ = __spec__
    sys.modules["__main__"] = replacement
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def follow_parent(index: int, count: int) -> None:
    """Makes this worker exit when its parent process ends, even if the parent is killed."""
    parent = multiprocessing.parent_process()
    assert parent  # this runs in a worker

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__mp_main__":
    # makes `import jax` fail, which grain accepts
    sys.modules.setdefault("jax", None)  # pyright: ignore[reportArgumentType]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command handles Ctrl-C
    logging.disable(logging.WARNING)  # grain warns that JAX is missing
    import grain  # noqa: F401

    logging.disable(logging.NOTSET)
