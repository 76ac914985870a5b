"""Programs that do their work in turns, so that what disturbs the machine disturbs all of them.

Each is a process of its own. It prints a line of JSON with `ready` and the versions of its
libraries, then does its work once for each line that it reads, and prints what that took (`serve`).
`Side` is the other end. Nothing here imports JAX: benchmarks/ uses it beside other libraries.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from clipx.errors import RunError

Turn = dict[str, Any]  # "seconds", "cpu" and "faults" of one turn, and what the program adds


def spent() -> dict[str, float]:
    """Elapsed seconds, CPU seconds (user and system) and page faults of this process so far, those
    of child processes that have ended included."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return {
        "seconds": time.perf_counter(),
        "cpu": sum(usage.ru_utime + usage.ru_stime for usage in usages),
        "faults": sum(usage.ru_minflt for usage in usages),
    }


def memory() -> float:
    """MiB of memory that this process holds now; 0 where the system does not say."""
    return _status("VmRSS")


def peak_memory() -> float:
    """The most MiB that this process has held, since `reset_peak` where the system allows that."""
    return _status("VmHWM")


def reset_peak() -> None:
    """Makes `peak_memory` forget what was before, on Linux."""
    with contextlib.suppress(OSError):
        pathlib.Path("/proc/self/clear_refs").write_text("5")


def _status(name: str) -> float:
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) / 1024
    return 0.0


def serve(work: Callable[[str], Mapping[str, Any] | None], versions: Mapping[str, str]) -> None:
    """Calls `work` with each line of stdin, and prints what the call took and what it returns."""
    answers = sys.stdout
    sys.stdout = sys.stderr  # what libraries print is no answer
    print(json.dumps({"ready": True, **versions}), file=answers, flush=True)
    for line in sys.stdin:
        before = spent()
        said = work(line.strip()) or {}
        turn = {name: value - before[name] for name, value in spent().items()}
        print(json.dumps({**turn, **said}), file=answers, flush=True)


class Missing(RunError):
    """A program cannot start, as one whose library is not installed. One line that says why."""


class Side:
    """A program that `serve`s. Use it as a context; `turn` asks for one turn."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None):
        self.command, self.environment = list(command), environment
        self.versions = ""  # of its libraries
        self._process: subprocess.Popen[str] | None = None

    def launch(self) -> None:
        """Starts the program; `ready` waits until it can work."""
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  # `end` closes it
        self._process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=self.environment,
        )

    def ready(self) -> None:
        """Waits until the program can work. Raises `Missing` if it ends before."""
        said = self.answer()
        self.versions = ", ".join(f"{k} {v}" for k, v in said.items() if k != "ready")

    def __enter__(self) -> Side:
        self.launch()
        try:
            self.ready()
        except BaseException:
            self.end(kill=True)
            raise
        return self

    def __exit__(self, *raised: Any) -> None:
        self.end(kill=bool(raised[0]))

    def end(self, *, kill: bool = False) -> None:
        """Ends the program. kill: also if it is in a turn."""
        if self._process is None:
            return
        requests, answers = self._process.stdin, self._process.stdout
        assert requests and answers
        with contextlib.suppress(BrokenPipeError):
            requests.close()
        if kill:
            self._process.kill()
        self._process.wait()
        answers.close()
        self._errors.close()

    def turn(self, request: str = "") -> Turn:
        """What one turn took. Raises `Missing` if the program has ended."""
        self.ask(request)
        return self.answer()

    def ask(self, request: str) -> None:
        """Starts a turn; `answer` waits for its end."""
        assert self._process and self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # `answer` says why it ended
            self._process.stdin.write(request + "\n")
            self._process.stdin.flush()

    def answer(self) -> Turn:
        """What the turn that was asked for took. Raises `Missing` if the program has ended."""
        assert self._process and self._process.stdout
        line = self._process.stdout.readline()
        while line and not line.startswith("{"):  # what libraries print from C++
            line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            last = (self._errors.read().strip().splitlines() or ["it ended"])[-1]
            raise Missing(f"{pathlib.Path(self.command[1]).name}: {last}")
        return json.loads(line)


@contextlib.contextmanager
def started(sides: Mapping[str, Side]) -> Iterator[tuple[dict[str, Side], dict[str, str]]]:
    """(the sides that could start, why the others could not), by name."""
    with contextlib.ExitStack() as stack:
        able, why = {}, {}
        for name, side in sides.items():
            try:
                able[name] = stack.enter_context(side)
            except Missing as error:
                why[name] = str(error)
        yield able, why


def alternate(sides: Mapping[str, Side], request: str, count: int) -> dict[str, list[Turn]]:
    """`count` turns of every side after one to warm up. No side is always the first. Those that end
    during a turn raise `Missing`."""
    turns: dict[str, list[Turn]] = {name: [] for name in sides}
    for number in range(count + 1):
        order = list(sides)[:: 1 if number % 2 else -1]
        for name in order:
            turn = sides[name].turn(request)
            if number:
                turns[name].append(turn)
    return turns


@contextlib.contextmanager
def side_by_side(sides: Sequence[Side]) -> Iterator[None]:
    """Context in which all sides run. They start together, as processes that wait for each other
    have to. Raises `Missing` if one of them cannot start."""
    try:
        for side in sides:
            side.launch()
        for side in sides:
            side.ready()
        yield
    finally:
        for side in sides:  # one that ends by itself waits for the others
            side.end(kill=True)


def together(sides: Sequence[Side], request: str) -> list[Turn]:
    """One turn of all sides at the same time."""
    for side in sides:
        side.ask(request)
    return [side.answer() for side in sides]
