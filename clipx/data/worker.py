"""What a loading process runs first, in place of the command that started it.

That command would import JAX, a second or two and its memory in every process, and so would grain
where JAX is installed. Loading needs neither.
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


@contextlib.contextmanager
def light_main():
    """New processes started inside this context run this file first, not the main script."""
    main = sys.modules["__main__"]
    stand_in = types.ModuleType("__main__")
    stand_in.__spec__ = __spec__
    sys.modules["__main__"] = stand_in
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def follow_parent(index: int, count: int) -> None:
    """Ends this worker when its parent is gone, however it ended: nobody else would."""

    def watch() -> None:
        multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__mp_main__":
    sys.modules.setdefault("jax", None)  # an import of it fails, and grain goes on without
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the command's to handle
    logging.disable(logging.WARNING)  # grain says that it found no JAX
    import grain  # noqa: F401

    logging.disable(logging.NOTSET)
