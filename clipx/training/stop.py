"""Whether a run was told to stop."""

from __future__ import annotations

import contextlib
import signal

import jax
from jax.experimental import multihost_utils


class Stop:
    """Whether the run was told to stop: SIGTERM or SIGINT, or, with several processes, JAX's word
    that one of them was, which all of them hear at one call: they all ask at the same places."""

    def __init__(self):
        self.asked = False
        self._calls = 0
        self._old = {}

    def __enter__(self) -> Stop:
        numbers = (signal.SIGINT, signal.SIGTERM) if jax.process_count() == 1 else ()
        with contextlib.suppress(ValueError):  # not in the main thread: no signals, then
            self._old = {n: signal.signal(n, self._ask) for n in numbers}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _ask(self, number, frame) -> None:
        self.asked = True
        signal.signal(number, self._old[number])  # a second one acts at once

    def __call__(self) -> bool:
        if jax.process_count() > 1 and not self.asked:
            self._calls += 1
            self.asked = multihost_utils.reached_preemption_sync_point(self._calls)
        return self.asked
