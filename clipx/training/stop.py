"""Whether a run is asked to stop."""

from __future__ import annotations

import contextlib
import signal
import types
from typing import Any

import jax
from jax.experimental import multihost_utils


class Stop:
    """A function that tells whether the run is asked to stop, and a context manager that listens.

    A single process listens to SIGTERM and SIGINT. With several processes JAX's preemption notice
    decides, and all of them get True at the same call. So all must call it at the same places.

    kill: a second signal ends the process as the system does. Python's KeyboardInterrupt, which a
    notebook needs, may come in a callback that swallows it.
    """

    def __init__(self, *, kill: bool = False):
        self.asked, self._kill = False, kill
        self._calls = 0
        self._old: dict[int, Any] = {}  # the handlers before this one, by signal

    def __enter__(self) -> Stop:
        numbers = (signal.SIGINT, signal.SIGTERM) if jax.process_count() == 1 else ()
        with contextlib.suppress(ValueError):  # outside of the main thread no signal can be handled
            self._old = {n: signal.signal(n, self._ask) for n in numbers}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: types.FrameType | None) -> None:
        self.asked = True
        # a second signal ends the process at once
        signal.signal(number, signal.SIG_DFL if self._kill else self._old[number])

    def __call__(self) -> bool:
        if jax.process_count() > 1 and not self.asked:
            self._calls += 1
            self.asked = multihost_utils.reached_preemption_sync_point(self._calls)
        return self.asked
