"""How long a training command takes to its first step, and several processes beside one."""

from __future__ import annotations

import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence

from clipx.errors import RunError
from clipx.planning import turns
from clipx.planning.rows import Step

_LONGEST = 600.0  # seconds that a first step may take


def first_step(step: Step, workdir: pathlib.Path, cache: pathlib.Path, *more: str) -> float:
    """Seconds from the command `clipx.train` to the line of its first step in metrics.jsonl. The
    command is ended then.

    cache: where JAX keeps compiled programs. more: further arguments. Raises `RunError` if there is
    no first step.
    """
    flags = [f"--config.{path}={text}" for path, text in step.overrides]
    flags += ["--config.train.log_every_steps=1", "--config.evals={}", "--config.train.best="]
    command = [sys.executable, "-m", "clipx.train", f"--config={step.config}"]
    lines = workdir / "metrics.jsonl"
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            [*command, f"--workdir={workdir}", *flags, *more],
            stdout=said,
            stderr=said,
            env=os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)},
        )
        try:
            while not (lines.exists() and lines.stat().st_size):
                if process.poll() is not None or time.perf_counter() - started > _LONGEST:
                    said.seek(0)
                    last = (said.read().strip().splitlines() or ["nothing"])[-1]
                    raise RunError(f"no first step of {step.name}: {last}")
                time.sleep(0.01)
            return time.perf_counter() - started
        finally:
            process.kill()
            process.wait()


def starts(step: Step, count: int) -> dict[str, list[float]]:
    """Seconds to the first step by kind of start, `count` times each: without compiled programs,
    with those of the same command, and with those of a run of another length."""
    kinds: dict[str, list[float]] = {"cold": [], "warm": [], "warm, another length": []}
    with tempfile.TemporaryDirectory(prefix="clipx-bench-") as folder:
        for number in range(count):
            place = pathlib.Path(folder, str(number))
            for kind, epochs in zip(kinds, (15, 15, 16)):
                length = f"--config.train.total_epochs={epochs}"
                run = place / kind.replace(" ", "_")
                kinds[kind].append(first_step(step, run, place / "programs", length))
    return kinds


def imports(modules: Sequence[str], count: int) -> tuple[dict[str, list[float]], dict[str, str]]:
    """(seconds of a new Python's `import MODULE` for each module, in turns, after one to warm up;
    why others do not import).

    Other libraries are imported as clipx does it, which a torchvision built for another torch does
    not keep from working.
    """
    seconds: dict[str, list[float]] = {module: [] for module in modules}
    why = {}
    for number in range(count + 1):
        for module in modules:
            code = f"import {module}"
            if not module.startswith("clipx"):
                code = f"from clipx.interop import libraries; libraries.require({module!r})"
            started = time.perf_counter()
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
            if done.returncode:
                why[module] = (done.stderr.strip().splitlines() or ["it ended"])[-1]
            elif number:
                seconds[module].append(time.perf_counter() - started)
    return {module: found for module, found in seconds.items() if module not in why}, why


def environments(processes: int) -> Iterator[Mapping[str, str]]:
    """The environment of each of `processes` processes of one run on this machine's CPU."""
    if processes == 1:
        yield os.environ
        return
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=1".strip()
    for number in range(processes):
        yield os.environ | {
            "XLA_FLAGS": flags,
            "JAX_PLATFORMS": "cpu",
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": str(processes),
            "JAX_PROCESS_ID": str(number),
        }


def rates(sides: Sequence[turns.Side], step: Step, rows: int) -> list[float]:
    """Images a second of the processes `sides` of one run, in each turn after one to warm up."""
    found = []
    for number in range(step.turns + 1):
        done = turns.together(sides, str(step.each))
        if number:
            found.append(rows * step.each / max(turn["seconds"] for turn in done))
    return found
