"""Starts several processes as one run: waits for all, compares what they run, and times barriers.

If a process is missing, JAX's own start ends the others without saying which one; it also compares
nothing. So the processes first meet at the address where process 0 will serve JAX. Each reports who
it is and what it runs. Process 0 answers all of them with the complete table, or with the processes
that did not come.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import itertools
import json
import os
import pathlib
import platform
import re
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from clipx.config.binding import difference, to_lists
from clipx.errors import ConfigError, HostsError
from clipx.parallel.environment import ProcessInfo

_PACKAGES = (
    *("clipx", "jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin"),
    *("flax", "optax", "orbax-checkpoint", "grain", "numpy"),
)
_names: list[str] = []  # the host of every process, once they have met
_gathered = itertools.count()  # a barrier's name can be used once
# what the error of a collective contains if another process has left it
_LEFT = re.compile(
    r"gloo|nccl|unavailable|deadline_exceeded|barrier|coordination|connection (reset|closed)",
    re.IGNORECASE,
)


def seconds() -> float:
    """How long a process waits for the others, in seconds: CLIPX_WAIT_SECONDS, default 300. Raises
    `ConfigError` unless that is a positive number."""
    text = os.environ.get("CLIPX_WAIT_SECONDS", "300")
    with contextlib.suppress(ValueError):
        if float(text) > 0:
            return float(text)
    raise ConfigError("CLIPX_WAIT_SECONDS", repr(text), "a positive number of seconds")


def facts(config: Mapping[str, Any] | None = None, **command: Any) -> dict[str, Any]:
    """What must be equal in every process: versions, clipx's own files, config and command."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    package, digest = pathlib.Path(__file__).parents[1], hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(str(file.relative_to(package)).encode() + b"\0" + file.read_bytes())
    versions["clipx files"] = digest.hexdigest()[:12]
    return {"versions": versions, "config": to_lists(config or {}), "command": to_lists(command)}


def refuse_skew(table: Sequence[Mapping[str, Any]]) -> None:
    """Raises `ConfigError` if a process differs from process 0. It names the first such process and
    both values of everything that differs."""
    first = table[0]
    for other in table[1:]:
        for what in ("versions", "config", "command"):
            lines = difference(first["facts"][what], other["facts"][what], what)
            if lines:
                names = [_who(i, table) for i in (0, table.index(other))]
                raise ConfigError(
                    "the processes of this run",
                    f"{names[0]} -> {names[1]}:\n    " + "\n    ".join(lines),
                    f"the same {what} in every process",
                    "install the same on every host, and start each with the same command",
                )


def _who(process: int, table: Sequence[Mapping[str, Any] | None]) -> str:
    """The name of a process in messages, with its host if the table has it."""
    known = table[process] if process < len(table) else None
    return f"process {process} ({known['host']})" if known else f"process {process}"


def meet(info: ProcessInfo, facts: Mapping[str, Any], wait: float) -> list[dict[str, Any]]:
    """The reports of all processes, in order: {"process", "processes", "host", "facts"}. Raises
    `HostsError` if some have not come after `wait` seconds, and names them."""
    own: dict[str, Any] = {"process": info.process, "processes": info.processes}
    own |= {"host": socket.gethostname(), "facts": dict(facts)}
    deadline = time.monotonic() + wait
    if info.process == 0:
        reply = _receive(info, own, deadline, wait)
    else:
        reply = _report(info, own, deadline, wait)
    if "error" in reply:
        raise HostsError(reply["error"])
    return reply["table"]


def _receive(info: ProcessInfo, own: dict, deadline: float, wait: float) -> dict[str, Any]:
    """Process 0's part of `meet`: collects the others' reports and sends all the same reply."""
    try:
        dual = socket.has_dualstack_ipv6()
        listener = socket.create_server(
            ("", info.port),
            family=socket.AF_INET6 if dual else socket.AF_INET,
            dualstack_ipv6=dual,
            backlog=min(info.processes, 1024),
        )
    except OSError as error:
        raise HostsError(
            f"process 0 ({own['host']}) cannot listen at port {info.port} ({error.strerror}): "
            "an earlier run may still use it. End that run, or choose another port"
        ) from None
    table: list[dict | None] = [own] + [None] * (info.processes - 1)
    peers: dict[int, socket.socket] = {}
    with listener, contextlib.ExitStack() as stack:
        fault = ""
        while None in table and not fault and (left := deadline - time.monotonic()) > 0:
            listener.settimeout(left)
            try:
                peer = stack.enter_context(listener.accept()[0])
                peer.settimeout(5)
                report = json.loads(peer.makefile("rb").readline())
                number = report["process"]
            except (OSError, ValueError, KeyError, TypeError):
                continue  # not a process of this run, or one that hung up and will try again
            if number in peers and _alive(peers[number]):
                hosts = f"{(table[number] or own)['host']} and {report['host']}"
                fault = f"process {number} came twice, from {hosts}: each needs a number of its own"
            elif report["processes"] != info.processes:
                numbers = f"{report['processes']} on {report['host']} and {info.processes} on "
                fault = f"the number of processes is {numbers}{own['host']}: it must be the same"
            peers[number], table[number % len(table)] = peer, report
        if None in table and not fault:
            missing = [f"process {i}" for i, report in enumerate(table) if report is None]
            came = ", ".join(_who(i, table) for i, report in enumerate(table) if report)
            fault = f"{', '.join(missing)} of {info.processes} did not come to "
            fault += (
                f"{info.address} within {wait:.0f} s; present: {came}.\nLook at the log of each "
            )
            fault += "missing process: it may have failed earlier, or cannot reach that address"
        reply = {"error": fault} if fault else {"table": table}
        line = json.dumps(reply).encode() + b"\n"
        for peer in peers.values():
            with contextlib.suppress(OSError):
                peer.sendall(line)
        for peer in peers.values():  # let them hang up first, so that the port is free at once
            with contextlib.suppress(OSError):
                peer.recv(1)
    return reply


def _alive(peer: socket.socket) -> bool:
    """Whether the other end of a connection is still open."""
    peer.setblocking(False)
    try:
        return peer.recv(1) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        peer.settimeout(5)


def _report(info: ProcessInfo, own: dict, deadline: float, wait: float) -> dict[str, Any]:
    """The other processes' part of `meet`: reports this process until process 0 replies."""
    host, _, port = info.address.rpartition(":")
    line, reason = json.dumps(own).encode() + b"\n", "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), min(left, 5)) as peer:
                peer.sendall(line)
                # process 0 may have started to wait a little later
                peer.settimeout(left + min(wait, 15))
                reply = peer.makefile("rb").readline()
            if reply:
                return json.loads(reply)
            reason = "process 0 hung up"
        except ValueError:
            reason = "another program answers there: end what an earlier run left on that host"
            break
        except OSError as error:
            reason = error.strerror or str(error)
        time.sleep(0.2)
    raise HostsError(
        f"process {info.process} ({own['host']}) did not reach process 0 at {info.address} "
        f"within {wait:.0f} s ({reason}). Process 0 is missing, or the address is not its own"
    )


def start(info: ProcessInfo, config: Mapping[str, Any] | None = None, **command: Any) -> None:
    """Initialises JAX's distributed runtime, once all processes are there and run the same.

    Raises `HostsError` for a missing process or uneven devices, and `ConfigError` if the processes
    differ in versions, config or command."""
    table = meet(info, facts(config, **command), seconds())
    refuse_skew(table)
    jax.distributed.initialize(
        info.address,
        info.processes,
        info.process,
        local_device_ids=info.devices,
        cluster_detection_method="deactivate",
        initialization_timeout=int(max(seconds(), 30)),
    )
    refuse_uneven([device.process_index for device in jax.devices()], table)
    _names[:] = [report["host"] for report in table]


def hosts() -> list[str]:
    """The host of every process; [] in a run of one process."""
    return list(_names)


def refuse_uneven(owners: list[int], table: Sequence[Mapping[str, Any]]) -> None:
    """Raises `HostsError` unless all processes have the same number of devices, at least one.
    `owners`: the process of each device."""
    counts = [owners.count(i) for i in range(len(table))]
    if len(owners) != sum(counts) or len(set(counts)) > 1 or not all(counts):
        lines = "\n".join(f"  {_who(i, table)}: {count}" for i, count in enumerate(counts))
        raise HostsError(f"the processes have different numbers of devices:\n{lines}")


def barrier(name: str, wait: float | None = None) -> None:
    """Returns when every process has called it with this name. Raises `HostsError` after `wait`
    seconds (default: `seconds()`), and names the missing processes.

    It uses no device, so it also waits for processes that still load or compile."""
    if jax.process_count() == 1:
        return
    from orbax.checkpoint import multihost  # public, and timed; JAX's own barrier waits for ever

    wait = seconds() if wait is None else wait
    try:
        multihost.get_barrier_sync_fn()(key=f"clipx/{name}", timeout_ms=int(wait * 1000))
    except jax.errors.JaxRuntimeError as error:
        table = [{"host": host} for host in hosts()]
        late = re.findall(r"^(?:\S*task:)?(\d+)\s*$", str(error), re.MULTILINE)
        if not late:
            raise HostsError(f"waiting for the other processes at {name!r}: {error}") from None
        raise HostsError(
            f"{', '.join(_who(int(i), table) for i in late)} did not come to {name!r} within "
            f"{wait:.0f} s: look at the log of each"
        ) from None


def lost(error: Exception, wait: float = 10.0) -> str:
    """What to report for a collective's error that a lost process has caused: which processes do
    not answer. "" for any other error. All remaining processes must call this together."""
    if not hosts() or not _LEFT.search(str(error)):
        return ""
    try:
        barrier("lost", wait)
        who = "all of them still answer, so a connection broke"
    except HostsError as missing:
        who = str(missing).replace("did not come to 'lost' within", "did not answer within")
    line = " ".join(str(error).split())[:200]
    return (
        f"other processes are gone from this run: {who}.\nStart all processes again; they go on "
        f"from the last checkpoint, which is complete. ({line})"
    )


def gather(name: str, text: str, wait: float | None = None) -> list[str]:
    """The `text` of every process, in their order. All must call it with the same name. Raises
    `HostsError` if some have not come after `wait` seconds, as `barrier` does."""
    if jax.process_count() == 1:
        return [text]
    barrier(f"{name}/{next(_gathered)}", wait)  # a collective on CPUs waits only 30 s
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(data)))
    padded = np.zeros(max(int(sizes.max()), 1), np.uint8)
    padded[: len(data)] = data
    rows = multihost_utils.process_allgather(padded)
    return [row[:size].tobytes().decode() for row, size in zip(rows, sizes)]
