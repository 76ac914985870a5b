"""A run's metrics: written to metrics.jsonl, shown as a progress bar or lines, and replayed for
TensorBoard and Weights & Biases if the config asks for it."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from clipx.config import ranges, reading
from clipx.errors import MetricsError
from clipx.training import mirrors
from clipx.training.metric_table import HEADLINES, RENAMED, metric, spelled

FILE = "metrics.jsonl"
_LARGEST = 1 << 30  # bytes, of some million lines


class Metrics:
    """A context manager around the loop. Every process makes one; only process 0 writes.

    Entering it removes the lines after `step`, which a killed run wrote after its last checkpoint,
    and a half-written last line. After a resume the file therefore holds the same lines as that of
    an uninterrupted run. `total_steps` may be less than the steps that the file already holds.

    steps_per_epoch: None for a run without epochs. evals: the config's section, from which `metric`
    learns each eval's evaluator. wandb: the project of Weights & Biases; "": none. config: what it
    shows as the run's config. Raises `MetricsError` for a workdir that cannot be written, a full
    disk, and a missing tensorboardX or wandb.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        *,
        total_steps: int,
        batch_size: int,
        steps_per_epoch: float | None = None,
        step: int = 0,
        tensorboard: bool = False,
        evals: Mapping[str, Any] | None = None,
        wandb: str = "",
        config: Mapping[str, Any] | None = None,
    ):
        self._path = pathlib.Path(workdir, FILE)
        self._total, self._batch, self._epoch = total_steps, batch_size, steps_per_epoch
        self._start, self._evals = step, evals or {}
        self._tensorboard, self._wandb, self._config = tensorboard, wandb, config or {}
        self._main = jax.process_index() == 0
        self._file: io.FileIO | None = None
        self._bar: tqdm | None = None
        self._mirrors: list[mirrors.Replay] = []
        self._first: tuple[int, float] | None = None  # (step, seconds) where the rate starts

    def __enter__(self) -> Metrics:
        if not self._main:
            return self
        with contextlib.ExitStack() as stack, self._clear_errors():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = stack.enter_context(open(self._path, "ab", buffering=0))
            self._known = _rewind(self._path, self._start)
            self._mirrors = [stack.enter_context(x) for x in self._opened(self._path.parent)]
            if sys.stderr.isatty():
                bar = tqdm(total=self._total, initial=self._start, unit="step", dynamic_ncols=True)
                self._bar = stack.enter_context(bar)
            self._open = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._main:
            self._open.close()

    def log(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Appends one line: step, examples, epoch, and `scalars` (numbers or arrays of one number).

        Blocks until the arrays are computed. A line with a `loss` is a training step, whose numbers
        the bar shows. Any other line is an evaluation, which gets its own line on the console.
        """
        if not self._main:
            return
        fetched = jax.device_get(list(scalars.values()))  # one transfer; a dict would be sorted
        values = {key: _number(value) for key, value in zip(scalars, fetched)}
        head: dict[str, Any] = {"step": step, "examples": step * self._batch}
        if self._epoch:
            head["epoch"] = round(step / self._epoch, 4)
        if step == self._start:  # a resumed run evaluates again at the step of its checkpoint
            values = {key: v for key, v in values.items() if key not in self._known}
        if values:
            self._append(head | values)
            for mirror in self._mirrors:
                mirror.send(head | values)
        self._show(head, values)

    def _opened(self, folder: pathlib.Path) -> Iterator[contextlib.closing[mirrors.Replay]]:
        """Where the metrics go too, with the file's lines sent that have not been."""
        rows = read(folder) if self._tensorboard or self._wandb else []
        opened = [mirrors.tensorboard(folder, self._start)] if self._tensorboard else []
        if self._wandb:
            opened.append(mirrors.wandb(folder, self._wandb, self._config))
        for mirror in opened:
            mirror.replay(rows)
            yield contextlib.closing(mirror)

    def progress(self, step: int) -> None:
        """Moves the bar to `step`. It is cheap: call it after every step."""
        if self._main and self._first is None:
            self._first = (step, time.monotonic())  # the rate leaves the first step out
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def back(self, step: int) -> None:
        """Goes back to `step`, as a run that is started again from there does."""
        if self._main:
            self._open.close()
        self._start, self._first = step, None
        self.__enter__()

    def say(self, line: str) -> None:
        """Prints a line: above the bar if there is one, else on stdout."""
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        elif self._main:
            print(line, flush=True)

    def _append(self, row: Mapping[str, Any]) -> None:
        """Writes one line to the file, or nothing and raises `MetricsError`."""
        strict = {k: _strict(v) for k, v in row.items()}
        line = (json.dumps(strict, allow_nan=False) + "\n").encode()
        assert self._file is not None  # only process 0 comes here, inside the context
        with self._clear_errors():
            end = os.fstat(self._file.fileno()).st_size
            try:
                if self._file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                self._file.truncate(end)  # leave no half line
                raise

    def _show(self, head: Mapping[str, Any], values: Mapping[str, float]) -> None:
        """Shows a line's numbers in the bar or on the console."""
        training = "loss" in values
        if training:
            shown = {k: values[k] for k in HEADLINES if k in values}
        else:  # one number per class would bury the others; the file has them all
            shown = {k: v for k, v in values.items() if not metric(k, self._evals).detail}
        if training and self._bar is not None:
            self._bar.set_postfix({k: self._spelled(k, v) for k, v in shown.items()})
        elif shown:
            words = [f"step {head['step']:,}/{self._total:,}"]
            if "epoch" in head:
                words.append(f"epoch {head['epoch']:.2f}")
            words += [f"{key} {self._spelled(key, value)}" for key, value in shown.items()]
            if training and (left := self._seconds_left(head["step"])) is not None:
                words.append(f"{tqdm.format_interval(left)} left")
            self.say("  ".join(words))

    def _spelled(self, key: str, value: float) -> str:
        return spelled(metric(key, self._evals), value)

    def _seconds_left(self, step: int) -> float | None:
        """Seconds until the last step at the rate so far; None before the second step."""
        if self._first is None or step <= self._first[0]:
            return None
        rate = (time.monotonic() - self._first[1]) / (step - self._first[0])
        return rate * (self._total - step)

    @contextlib.contextmanager
    def _clear_errors(self) -> Iterator[None]:
        """Turns an `OSError` into a `MetricsError` that names the file."""
        try:
            yield
        except OSError as error:
            raise MetricsError(f"cannot write {self._path}: {error.strerror}") from None


def read(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, in order; [] if there is no file.

    NaN and infinities are floats again. A line that is not JSON, which a killed run may leave, is
    skipped.
    """
    path = pathlib.Path(workdir, FILE)
    lines = reading.read_bytes(path, _LARGEST).splitlines() if path.is_file() else []
    rows = (_row(line) for line in lines)
    return [row for row in rows if row is not None]


def _row(line: bytes) -> dict[str, Any] | None:
    """One line as a dict; None if it is not a line that `Metrics` wrote."""
    try:
        row = reading.parse_json(line, dict[str, Any])
        if not all(isinstance(x, int | float | str) for x in row.values()):
            return None
        if not isinstance(step := row.get("step"), int) or not 0 <= step <= ranges.INT:
            return None
        known = {str(RENAMED.get(key, key)): value for key, value in row.items()}
        return {k: float(v) if isinstance(v, str) else v for k, v in known.items()}
    except ValueError:
        return None


def _rewind(path: pathlib.Path, step: int) -> set[str]:
    """Removes the lines after `step` from the file, and returns the keys of the lines at `step`.

    A run that starts at step 0 has no checkpoint, so all lines go. The lines are in order of step.
    Truncating in place works on a full disk too.
    """
    end, known = 0, set()
    step = step or -1
    with open(path, "rb") as file:
        for line in file:
            row = _row(line)
            if not line.endswith(b"\n") or (row is not None and row["step"] > step):
                break
            end += len(line)
            if row is not None and row["step"] == step:
                known |= row.keys()
    if end < path.stat().st_size:
        os.truncate(path, end)
    return known


def _number(value: Any) -> int | float:
    """A number, or an array of one, as Python's int or float."""
    array = np.asarray(value)
    if array.ndim:
        raise TypeError(f"a metric is one number, not an array of shape {array.shape}")
    if array.dtype.kind in "iub":
        return int(array)
    return float(str(array[()]))  # the shortest digits that read back as the same float32


def _strict(value: int | float) -> int | float | str:
    """`value` as strict JSON can hold it: NaN and infinities become the names that Python and
    JavaScript read back."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
