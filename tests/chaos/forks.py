"""Training commands in forks of a process that has imported them: a start of a run costs its own
work alone. Each fork has a process group, its output in a file, and at most one fault."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import hashlib
import json
import os
import pathlib
import runpy
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from clipx import cli  # noqa: F401  this and the next are what the forks share
from clipx.reporting import page  # noqa: F401
from clipx.training import loop, session  # noqa: F401

HERE = pathlib.Path(__file__).parent
LIMIT = 150.0  # seconds after which a run hangs
Hook = Callable[[], None]


class Process:
    """A fork that runs the training command. `code` is its exit code; None while it runs."""

    def __init__(
        self, arguments: Sequence[str], out: pathlib.Path, env: Mapping[str, str], hook: Hook | None
    ):
        self.out, self.code, self.hung = out, None, False
        self.started = time.monotonic()
        sys.stdout.flush()
        with warnings.catch_warnings():  # JAX warns of forks; no device is open here
            warnings.simplefilter("ignore")
            self.pid = os.fork()
        if not self.pid:
            _child(arguments, out, env, hook)

    def poll(self) -> int | None:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code

    @property
    def text(self) -> str:
        return self.out.read_text(errors="replace")

    def end(self) -> None:
        """Kills what is left of the process and its group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        if self.code is None:
            self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def wait(processes: Sequence[Process], limit: float = LIMIT) -> None:
    """Waits until all have ended; those that take longer than `limit` are killed and marked."""
    end = time.monotonic() + limit
    while any(process.poll() is None for process in processes):
        if time.monotonic() > end:
            for process in processes:
                process.hung = process.poll() is None
            break
        time.sleep(0.02)
    for process in processes:
        process.end()


def _child(
    arguments: Sequence[str], out: pathlib.Path, env: Mapping[str, str], hook: Hook | None
) -> None:
    """The life of a fork, up to the exits of its threads."""
    code = 1
    try:
        os.setpgid(0, 0)
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: ends with the harness
        file = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for number in (1, 2):
            os.dup2(file, number)
        sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115  as long as the fork
        sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        os.environ.update(env)
        _record()
        if hook is not None:
            hook()
        sys.argv = ["clipx.train", *arguments]
        runpy.run_module("clipx.train", run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
    try:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
    finally:
        os._exit(code)


def _record() -> None:
    """Makes a run write where it starts, and the digest of the state that it ends with."""
    train = loop.Trainer.train

    def recorded(self, state, start):
        if jax.process_index() == 0:
            with open(self.folder / "starts.txt", "a") as file:
                file.write(f"{start}\n")
        state, finished = train(self, state, start)
        if finished:
            digest = hashlib.sha256()
            for shard in (s for x in jax.tree.leaves(state) for s in x.addressable_shards):
                digest.update(np.asarray(shard.data).tobytes())
            path = self.folder / f"digest-{jax.process_index()}.txt"
            path.write_text(digest.hexdigest())
        return state, finished

    loop.Trainer.train = recorded


def result(folder: pathlib.Path, count: int) -> dict[str, object]:
    """What a finished run came to: the digests of its state and its metrics without times."""
    digests = [(folder / f"digest-{i}.txt").read_text() for i in range(count)]
    kept, rows = ("step", "loss", "batch/", "retrieval/", "learning_rate", "logit_scale"), []
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        rows.append({k: v for k, v in json.loads(line).items() if k.startswith(kept)})
        rows[-1].pop("step_seconds", None)
    return {"digests": digests, "rows": [row for row in rows if len(row) > 1]}
