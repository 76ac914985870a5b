"""Several processes as one run: who they are, that all are there and alike, and timed barriers.

JAX's own start ends the process when one is missing, without saying which, and compares nothing.
So the processes meet first, at the address where process 0 will serve JAX: each says who it is and
what it runs; process 0 answers all of them with the whole table, or with who did not come.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import socket
import time
from collections.abc import Mapping
from typing import Any

import jax

from clipx.config.binding import difference, to_lists
from clipx.errors import ConfigError, HostsError
from clipx.parallel.environment import ProcessInfo

_PACKAGES = (
    *("clipx", "jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin"),
    *("flax", "optax", "orbax-checkpoint", "grain", "numpy"),
)
_names: list[str] = []  # of every process, once they have met
# what a collective says when another process has left it
_LEFT = re.compile(
    r"gloo|nccl|unavailable|deadline_exceeded|barrier|coordination|connection (reset|closed)",
    re.IGNORECASE,
)


def seconds() -> float:
    """How long a process waits for the others: CLIPX_WAIT_SECONDS, or five minutes."""
    text = os.environ.get("CLIPX_WAIT_SECONDS", "300")
    with contextlib.suppress(ValueError):
        if float(text) > 0:
            return float(text)
    raise ConfigError("CLIPX_WAIT_SECONDS", repr(text), "a positive number of seconds")


def facts(config: Mapping[str, Any] | None = None, **command: Any) -> dict[str, Any]:
    """What has to be alike in every process: versions, the package's own files, the config."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    package, digest = pathlib.Path(__file__).parents[1], hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(str(file.relative_to(package)).encode() + b"\0" + file.read_bytes())
    found["clipx files"] = digest.hexdigest()[:12]
    return {"versions": found, "config": to_lists(config or {}), "command": to_lists(command)}


def refuse_skew(table: list[Mapping[str, Any]]) -> None:
    """Raises `ConfigError` naming the first process that differs from process 0, and both values
    of everything in which they do."""
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


def _who(process: int, table: list[Mapping[str, Any] | None]) -> str:
    known = process < len(table) and table[process]
    return f"process {process} ({known['host']})" if known else f"process {process}"


def meet(info: ProcessInfo, told: Mapping[str, Any], wait: float) -> list[dict[str, Any]]:
    """What every process said of itself, in their order; `HostsError` after `wait` seconds without
    all of them, naming those that did not come."""
    own = {"process": info.process, "processes": info.processes}
    own |= {"host": socket.gethostname(), "facts": dict(told)}
    deadline = time.monotonic() + wait
    if info.process == 0:
        reply = _receive(info, own, deadline, wait)
    else:
        reply = _report(info, own, deadline, wait)
    if "error" in reply:
        raise HostsError(reply["error"])
    return reply["table"]


def _receive(info: ProcessInfo, own: dict, deadline: float, wait: float) -> dict[str, Any]:
    """Process 0's part: takes in the others' words, then answers all of them alike."""
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
            "an earlier run may still be there; end it, or choose another port"
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
                word = json.loads(peer.makefile("rb").readline())
                number = word["process"]
            except (OSError, ValueError, KeyError, TypeError):
                continue  # no process of ours, or one that ended: it comes again
            if number in peers and _alive(peers[number]):
                hosts = f"{table[number]['host']} and {word['host']}"
                fault = f"process {number} came twice, from {hosts}: each needs a number of its own"
            elif word["processes"] != info.processes:
                said = f"{word['processes']} on {word['host']} and {info.processes} on "
                fault = f"the number of processes is {said}{own['host']}"
            peers[number], table[number % len(table)] = peer, word
        if None in table and not fault:
            missing = [f"process {i}" for i, word in enumerate(table) if word is None]
            came = ", ".join(_who(i, table) for i, word in enumerate(table) if word)
            fault = f"{', '.join(missing)} of {info.processes} did not come to "
            fault += f"{info.address} within {wait:.0f} s; there: {came}.\nLook at the log of the "
            fault += "missing: it may have failed before, or cannot reach that address"
        reply = {"error": fault} if fault else {"table": table}
        line = json.dumps(reply).encode() + b"\n"
        for peer in peers.values():
            with contextlib.suppress(OSError):
                peer.sendall(line)
        for peer in peers.values():  # they hang up first: the port is free at once
            with contextlib.suppress(OSError):
                peer.recv(1)
    return reply


def _alive(peer: socket.socket) -> bool:
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
    """The part of the others: says who this is until process 0 answers."""
    host, _, port = info.address.rpartition(":")
    line, reason = json.dumps(own).encode() + b"\n", "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), min(left, 5)) as peer:
                peer.sendall(line)
                peer.settimeout(
                    left + min(wait, 15)
                )  # process 0 may have begun to wait a little later
                reply = peer.makefile("rb").readline()
            if reply:
                return json.loads(reply)
            reason = "it hung up"
        except ValueError:
            reason = "something else answers there: end what an earlier run left on that host"
            break
        except OSError as error:
            reason = error.strerror or str(error)
        time.sleep(0.2)
    raise HostsError(
        f"process {info.process} ({own['host']}) did not reach process 0 at {info.address} "
        f"within {wait:.0f} s ({reason}). Process 0 is missing, or that address is not its own"
    )


def start(info: ProcessInfo, config: Mapping[str, Any] | None = None, **command: Any) -> None:
    """Joins the other processes of the run, once all are there and run the same."""
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
    _names[:] = [word["host"] for word in table]


def hosts() -> list[str]:
    """The host of every process; [] for a single one."""
    return list(_names)


def refuse_uneven(owners: list[int], table: list[Mapping[str, Any]]) -> None:
    """Raises `HostsError` unless every process has devices, and as many as the others. `owners`:
    the process of each device."""
    counts = [owners.count(i) for i in range(len(table))]
    if len(owners) != sum(counts) or len(set(counts)) > 1 or not all(counts):
        said = "\n".join(f"  {_who(i, table)}: {count}" for i, count in enumerate(counts))
        raise HostsError(f"the devices that each process has are not as many:\n{said}")


def barrier(name: str, wait: float | None = None) -> None:
    """Returns when every process is here; `HostsError` naming the missing after `wait` seconds
    (default: `seconds()`).

    It needs no device: a process that still loads or compiles is waited for."""
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
            raise HostsError(f"waiting for the others at {name!r}: {error}") from None
        raise HostsError(
            f"{', '.join(_who(int(i), table) for i in late)} did not come to {name!r} within "
            f"{wait:.0f} s: look at the log there"
        ) from None


def lost(error: Exception, wait: float = 10.0) -> str:
    """What a collective's error means where another process has left it: who does not answer. ""
    for any other error. The processes that are left come here together."""
    if not hosts() or not _LEFT.search(str(error)):
        return ""
    try:
        barrier("lost", wait)
        who = "all of them still answer: a connection broke"
    except HostsError as missing:
        who = str(missing).replace("did not come to 'lost' within", "did not answer within")
    line = " ".join(str(error).split())[:200]
    return (
        f"the other processes are gone from this run: {who}.\nAll have to be started again; the "
        f"last checkpoint is whole, and they go on from there. ({line})"
    )
