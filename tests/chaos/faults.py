"""What the harness breaks. A fault in a running process is a hook that its fork calls before the
command starts; a fault at rest changes a stopped run's files.

Moments of a run are the functions that do them: a hook wraps one of them, and acts at a random time
after its n-th call began.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import pathlib
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable

from clipx.training import loop, session
from clipx.training.checkpoint import Checkpoints

MOMENTS = {  # name: (class, function, calls before the fault, most seconds until it comes)
    "compile": (session.Session, "_compile", 1, 0.3),
    "step": (loop.Trainer, "_drain", 4, 0.05),
    "save": (Checkpoints, "save", 1, 0.3),
    "eval": (loop.Trainer, "_evaluate", 1, 0.1),
    "refresh": (loop.Trainer, "_refresh", 2, 0.1),
}


@dataclasses.dataclass(frozen=True)
class Fault:
    """One way to break a run.

    codes: the exit codes that are right for the process that is broken. refused: text of the
    message of a run that must not go on until `undo` is called; "" if it goes on. newest: whether
    the newest checkpoint is lost with it.
    """

    name: str
    codes: tuple[int, ...]
    hook: Callable[[random.Random, pathlib.Path], Callable[[], None]] | None = None
    damage: Callable[[pathlib.Path], None] | None = None
    undo: Callable[[pathlib.Path], None] = lambda folder: None
    arguments: tuple[str, ...] = ()
    refused: str = ""
    newest: bool = False
    disk: bool = False  # needs a file system of its own


def at(
    moment: str, act: Callable[[], None], rng: random.Random | None = None
) -> Callable[[], None]:
    """A hook that calls `act` at a random time from the `moment` on; without `rng` before it, in
    the run's own thread."""
    cls, name, calls, most = MOMENTS[moment]
    delay = rng.uniform(0, most) if rng else None

    def hook() -> None:
        inner, left = getattr(cls, name), [calls]

        @functools.wraps(inner)
        def broken(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0 and delay is None:
                act()
            elif left[0] == 0:
                threading.Timer(delay, act).start()
            return inner(*args, **kwargs)

        setattr(cls, name, broken)

    return hook


def send(*numbers: signal.Signals, apart: float = 0.0) -> Callable[[], None]:
    def act() -> None:
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(apart)

    return act


def stop_and_go_on() -> None:
    subprocess.Popen(["sh", "-c", f"sleep 2; kill -CONT {os.getpid()}"])
    os.kill(os.getpid(), signal.SIGSTOP)


def children() -> list[int]:
    found = []
    for task in pathlib.Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            found += map(int, (task / "children").read_text().split())
    return found


def is_worker(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return b"spawn_main" in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def kill_worker() -> None:
    """Kills the data workers, as soon as there is one."""
    for _ in range(2000):
        workers = [pid for pid in children() if is_worker(pid)]
        if workers:
            for pid in workers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return
        time.sleep(0.005)


def clock(seconds: float) -> Callable[[], None]:
    def jump() -> None:
        real = time.time
        time.time = lambda: real() + seconds

    return jump


def _shard(folder: pathlib.Path) -> pathlib.Path:
    return next((folder / "data").glob("*.tar"))


def cut(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: pathlib.Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1 << 6
    path.write_bytes(data)


def empty(path: pathlib.Path) -> None:
    path.write_bytes(b"")


def remove(path: pathlib.Path) -> None:
    path.unlink()


CHANGES = {"cut": cut, "one bit flipped": flip, "emptied": empty, "removed": remove}


def steps(folder: pathlib.Path) -> list[int]:
    """The steps of the complete checkpoints, ascending."""
    names = (path.name for path in (folder / "run" / "checkpoints").glob("*"))
    return sorted(int(name) for name in names if name.isdigit())


def newest(folder: pathlib.Path) -> pathlib.Path:
    return folder / "run" / "checkpoints" / str(steps(folder)[-1])


def running(method: str) -> list[Fault]:
    """Faults of a running process."""
    moments = [m for m in MOMENTS if m != "refresh" or method == "protoclip"]
    made = []
    for m in moments:
        made += [
            Fault(f"kill -9 ({m})", (-9,), lambda rng, _, m=m: at(m, send(signal.SIGKILL), rng)),
            Fault(
                f"SIGTERM ({m})",
                (42, 0, -15),
                lambda rng, _, m=m: at(m, send(signal.SIGTERM), rng),
            ),
            Fault(
                f"two interrupts ({m})",
                (130, -2, 42, 0),
                lambda rng, _, m=m: at(m, send(signal.SIGINT, signal.SIGINT, apart=0.01), rng),
            ),
        ]
    made.append(Fault("stopped, goes on", (0,), lambda rng, _: at("step", stop_and_go_on, rng)))
    for name, seconds in (("a week ahead", 7 * 86400.0), ("a day back", -86400.0)):
        made.append(Fault(f"clock {name}", (0,), lambda rng, _, s=seconds: at("step", clock(s))))
        made.append(
            Fault(f"clock {name} (save)", (0,), lambda rng, _, s=seconds: at("save", clock(s), rng))
        )
    one = ("--config.data.workers=1",)
    made += [
        Fault(
            "worker killed as it starts",
            (1,),
            lambda rng, _: at("compile", kill_worker, rng),
            arguments=one,
        ),
        Fault("worker killed", (1, 0), lambda rng, _: at("step", kill_worker, rng), arguments=one),
    ]
    return made


def shards(method: str) -> list[Fault]:
    """Faults of the data under a run."""

    def fault(name, change):
        def hook(rng, folder):
            def act() -> None:
                shutil.copy2(_shard(folder), folder / "kept.tar")
                change(_shard(folder))

            return at("compile", act)

        def undo(folder):
            if not (folder / "kept.tar").exists():
                return
            shutil.move(folder / "kept.tar", folder / "data" / "pairs.tar")

        return Fault(f"shard {name} in mid-run", (1, 0), hook, undo=undo)

    def other(path: pathlib.Path) -> None:
        data = bytearray(path.read_bytes())
        data[600:900] = bytes(300)
        path.write_bytes(data)

    return [fault(name, change) for name, change in (*CHANGES.items(), ("with other bytes", other))]


def _fill(folder: pathlib.Path) -> None:
    with open(folder / "ballast", "wb", buffering=0) as file:
        try:
            while True:
                file.write(b"\0" * 4096)
        except OSError:
            return


def _read_only(folder: pathlib.Path) -> None:
    """What is opened below `folder` from now on is on a mount that takes no writes."""
    for how in (["--bind", str(folder)], ["-o", "remount,bind,ro"]):
        subprocess.run(["mount", *how, str(folder)], check=True)


def _writable(folder: pathlib.Path) -> None:
    subprocess.run(["umount", str(folder)], check=True)


def disks(method: str) -> list[Fault]:
    return [
        Fault(
            "full disk (save)",
            (1,),
            lambda rng, folder: at("save", lambda: _fill(folder / "run")),
            undo=lambda folder: (folder / "run" / "ballast").unlink(missing_ok=True),
            disk=True,
        ),
        Fault(
            "disk read-only (save)",
            (1,),
            lambda rng, folder: at("save", lambda: _read_only(folder / "run")),
            undo=lambda folder: (
                subprocess.run(["umount", str(folder / "run")], check=True) and None
            ),
            disk=True,
        ),
    ]


def peers(method: str) -> list[Fault]:
    """Faults of one of several processes. The others must end with it, within a bounded time."""
    kept = ("kill -9", "SIGTERM", "stopped")
    found = [f for f in running(method) if f.name.startswith(kept)]
    late = Fault("starts 8 s late", (0,), lambda rng, _: lambda: time.sleep(8))
    never = Fault(
        "never starts", (-9,), lambda rng, _: lambda: os.kill(os.getpid(), signal.SIGKILL)
    )
    return [*found, late, never]
