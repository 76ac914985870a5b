"""Counts where a run's wall time goes."""

from __future__ import annotations

import collections
import contextlib
import time
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Literal

Part = Literal["data", "evaluate", "save", "episode"]
_PARTS = typing.get_args(Part)


class Clock:
    """Counts a run's wall time, in seconds, by part: `data` (waiting for a batch), `evaluate`,
    `save`, `episode` (the pass before an episode's steps), and `train`, which is the rest.

    JAX runs steps asynchronously, so no single step is timed. Before entering a part other than
    `data`, wait for the last step (fetching its metrics does). `totals` is a plain dict to save
    with the run; `Clock(totals)` continues from it.
    """

    def __init__(
        self,
        totals: Mapping[str, float] | None = None,
        now: Callable[[], float] = time.perf_counter,
    ):
        self._now = now
        self.totals = dict.fromkeys(("train", *_PARTS), 0.0) | dict(totals or {})
        self._start = now()
        self._parts = dict.fromkeys(_PARTS, 0.0)
        # (images, seconds of stepping, of them waiting for data) of the last intervals
        self._intervals: collections.deque[tuple[int, float, float]] = collections.deque()

    @contextlib.contextmanager
    def time(self, part: Part) -> Iterator[None]:
        """Adds the seconds inside the `with` block to `part`. Parts do not nest."""
        start = self._now()
        try:
            yield
        finally:
            self._parts[part] += self._now() - start

    def total(self, part: str | None = None) -> float:
        """Seconds of a part, or of all parts, up to now."""
        if part is None:
            return sum(self.totals.values()) + self._now() - self._start
        return self.totals[part] + self._parts[part]

    def interval(self, images: int, window: int = 0) -> dict[str, float]:
        """`images_per_second` and `data_wait_fraction` since the last call, of the time in `train`
        and `data` alone. Ends the interval and adds its seconds to `totals`.

        window: the least images to measure over. For fewer, earlier intervals count too: steps that
        were computed ahead are fetched in no time.
        """

        now = self._now()
        parts = {"train": now - self._start - sum(self._parts.values()), **self._parts}
        for part, seconds in parts.items():
            self.totals[part] += seconds
        self._start, self._parts = now, dict.fromkeys(self._parts, 0.0)
        self._intervals.append((images, parts["train"] + parts["data"], parts["data"]))
        while sum(n for n, *_ in self._intervals) - self._intervals[0][0] >= max(window, 1):
            self._intervals.popleft()
        images, stepping, waiting = map(sum, zip(*self._intervals))
        stepping = max(stepping, 1e-9)
        return {"images_per_second": images / stepping, "data_wait_fraction": waiting / stepping}
