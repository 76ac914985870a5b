"""Whether this host, or all hosts of a run, are fit to train: findings, and what to mend."""

from __future__ import annotations

import collections
import glob
import os
import platform
import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from clipx.data.base import Source
from clipx.errors import BadSample, DataError, RunError, install_hint
from clipx.parallel import mesh as meshes
from clipx.parallel import processes
from clipx.parallel.environment import read_metadata
from clipx.training.checkpoint import prepare_workdir
from clipx.training.schema import EvalSpec, data_section

TPU_LOCK = "/tmp/libtpu_lockfile"
_SLOW = 1e9  # bytes a second; wires between hosts or GPUs that train do better


class Finding(NamedTuple):
    """What one check found; `mend` says what to do, where there is something."""

    what: str
    found: str
    mend: str = ""
    fatal: bool = True  # else advice


def check_versions() -> Iterator[Finding]:
    """Python, JAX, and the plugin that the hardware needs."""
    found = processes.facts()["versions"]
    yield Finding("versions", ", ".join(f"{name} {version}" for name, version in found.items()))
    if not (3, 11) <= tuple(map(int, platform.python_version_tuple()[:2])) < (3, 14):
        yield Finding("python", found["python"], "install Python 3.11, 3.12 or 3.13")
    if found["jax"] != found["jaxlib"]:
        yield Finding(
            "jax",
            f"jax {found['jax']} with jaxlib {found['jaxlib']}",
            f"install both in one command: {install_hint('cuda', upgrade=True)} (or [tpu])",
            fatal=False,
        )


def _said(*command: str) -> str | None:
    """What a program prints; None where it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def check_drivers() -> Iterator[Finding]:
    """What accelerators the machine has, beside what JAX uses of them."""
    used, wanted = jax.devices()[0].platform, os.environ.get("JAX_PLATFORMS") or "any"
    gpus = _said("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    if gpus is not None:
        (line, count), *others = collections.Counter(gpus.splitlines()).most_common() or [("", 0)]
        mend = "" if used == "gpu" or wanted == "cpu" else install_hint("cuda")
        found = f"{count} x {line}" + ("; JAX sees none of them" if mend else "")
        yield Finding("gpu driver", found, mend)
        if others:
            yield Finding("gpu driver", gpus.replace("\n", "; "), "GPUs of one kind and driver")
    elif shutil.which("nvidia-smi"):
        yield Finding("gpu driver", "nvidia-smi fails", "mend NVIDIA's driver, or restart the host")
    chips = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
    on_tpu_vm = bool(chips) and "TPU_SKIP_MDS_QUERY" not in os.environ
    if used == "tpu":
        yield Finding("tpu", f"{jax.local_device_count()} chip(s) on this host")
    elif on_tpu_vm and wanted != "cpu":
        yield Finding("tpu", "this host has chips; JAX sees none", install_hint("tpu"))
    if os.path.exists(TPU_LOCK) and used != "tpu" and on_tpu_vm:
        held = _said("fuser", TPU_LOCK)
        mend = f"end process {held}" if held else f"no process has it: sudo rm {TPU_LOCK}"
        yield Finding("tpu lock", f"{TPU_LOCK} is there", mend)
    if not chips and gpus is None:
        yield Finding("accelerator", "none: the CPU computes")


def check_host() -> Iterator[Finding]:
    """What feeds the devices: cores, memory, and shared memory for the loading processes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("cores", f"{cores} for {jax.local_device_count()} device(s) of this process")
    if os.path.isdir("/dev/shm"):
        free = shutil.disk_usage("/dev/shm").free
        mend = "docker run --shm-size=16g (or a memory volume there)" if free < 2**30 else ""
        yield Finding("shared memory", f"{free / 2**30:.1f} GiB free", mend, fatal=False)
    pages = "/sys/kernel/mm/transparent_hugepage/enabled"
    if jax.devices()[0].platform == "tpu" and os.path.exists(pages):
        with open(pages) as file:
            always = "[always]" in file.read()
        mend = "" if always else f"sudo sh -c 'echo always > {pages}': starts are faster"
        yield Finding("huge pages", "always" if always else "not always", mend, fatal=False)


def check_devices() -> Iterator[Finding]:
    """Every device that the processes see together; they have met, and are as many on each."""
    kinds = collections.Counter(device.device_kind for device in jax.devices())
    total = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    yield Finding("devices", f"{total}, {jax.process_count()} process(es)")
    for process, host in enumerate(processes.hosts()):
        count = sum(device.process_index == process for device in jax.devices())
        yield Finding(f"process {process}", f"{host}: {count} device(s)")
    if len(kinds) > 1:
        yield Finding("devices", total, "devices of one kind: the slowest is waited for")


def all_reduce(devices=None, size: int = 2**24) -> float:
    """Bytes a second at which every device gets the sum of all devices' `size` bytes (twice the
    size crosses the wires of each, as in a ring). Raises `RunError` if the sum is wrong."""
    mesh = meshes.make_mesh(meshes.MeshConfig(), devices)
    count = mesh.devices.size
    rows = np.broadcast_to(np.arange(1, count + 1, dtype=np.float32)[:, None], (count, size // 4))
    rows = meshes.put(rows, meshes.batch_sharding(mesh))
    total = jax.jit(lambda x: jnp.sum(x, axis=0), out_shardings=meshes.replicated(mesh))
    local = np.asarray(total(rows).addressable_data(0))  # also compiles
    if not (local == count * (count + 1) / 2).all():
        raise RunError("an all-reduce of all devices gives a wrong sum")
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(total(rows))
        seconds.append(time.perf_counter() - start)
    return 2 * (count - 1) / count * size / statistics.median(seconds)


def check_bandwidth() -> Iterator[Finding]:
    if jax.device_count() == 1:
        return
    processes.barrier("doctor: all-reduce")
    platform = jax.devices()[0].platform
    speed = all_reduce(size=2**18 if platform == "cpu" else 2**24)
    slow = speed < _SLOW and platform != "cpu"
    yield Finding(
        "all-reduce",
        f"{speed / 1e9:.3g} GB/s for each of {jax.device_count()} devices",
        "NCCL_DEBUG=INFO says which wires it takes; hosts of one slice or rack" if slow else "",
        fatal=False,
    )


def check_workdir(workdir: str) -> Iterator[Finding]:
    """That every process can write there, and that it is one folder for all of them."""
    folder = prepare_workdir(workdir)
    own = folder / f".doctor_{jax.process_index()}"
    own.touch()
    processes.barrier("doctor: workdir written")
    there = [(folder / f".doctor_{i}").exists() for i in range(jax.process_count())]
    processes.barrier("doctor: workdir read")
    own.unlink()
    free = f"{folder}: {shutil.disk_usage(folder).free / 2**30:,.1f} GiB free"
    if all(there):
        yield Finding("workdir", free)
    else:
        missing = ", ".join(f"process {i}" for i, found in enumerate(there) if not found)
        mend = "a folder that all hosts share: NFS, or a mounted bucket"
        yield Finding("workdir", f"{folder}: what {missing} wrote is not there", mend)


def sources(config: Mapping[str, Any]) -> Iterator[tuple[str, Callable[[], Source]]]:
    """What a config reads: its place there, and what opens it."""
    if "data" in config:
        yield "config.data", data_section(config["data"])[1].open
    for name, section in config.get("evals", {}).items():
        for field, spec in EvalSpec.check(name, section).sources.items():
            yield f"config.evals.{name} ({field})", spec.open


def check_data(config: Mapping[str, Any]) -> Iterator[Finding]:
    """Opens everything that a config reads, and a few examples of each."""
    for where, start in sources(config):
        begun = time.perf_counter()
        try:
            source = start()
            opened = time.perf_counter()
            rows = np.linspace(0, len(source) - 1, min(len(source), 8)).astype(int)
            for row in rows.tolist():
                source[row]
        except BadSample as error:
            yield Finding(where, str(error), "clipx.dataset verify names every bad row", False)
            continue
        except DataError as error:
            yield Finding(where, str(error), "as it says; clipx.dataset preview shows the data")
            continue
        each = (time.perf_counter() - opened) / max(len(rows), 1)
        found = f"{len(source):,} rows; opened in {opened - begun:.1f} s, {each * 1e3:.1f} ms a row"
        yield Finding(where, found)


def buckets(value: Any) -> set[str]:
    """Every gs:// bucket that a config names."""
    if isinstance(value, Mapping):
        return set().union(*(buckets(v) for v in value.values()))
    if isinstance(value, (list, tuple)):
        return set().union(*(buckets(v) for v in value))
    return set(re.findall(r"gs://[a-z0-9._-]+", value)) if isinstance(value, str) else set()


def check_buckets(config: Mapping[str, Any], zone: str) -> Iterator[Finding]:
    """That the config's buckets are where this host is; `zone` is "" outside of Google's cloud."""
    region = zone.rpartition("/")[2].rpartition("-")[0]
    for bucket in sorted(buckets(config)):
        told = _said("gcloud", "storage", "buckets", "describe", bucket, "--format=value(location)")
        if told is None:
            yield Finding(bucket, "gcloud cannot describe it", "gcloud auth login", fatal=False)
            continue
        place = told.lower()
        near = region == place or region.startswith(f"{place}-")
        near = near or (place == "eu" and region.startswith("europe-"))
        copy = f"gcloud storage cp --recursive {bucket} gs://NAME-IN-{region}"
        mend = "" if near or not region else f"every byte read is charged; {copy}"
        yield Finding(bucket, f"in {place}, this host in {region or 'no Google zone'}", mend)


def examine(config: Mapping[str, Any] | None, workdir: str) -> Iterator[Finding]:
    """Every finding, in the order in which a run would meet what is wrong."""
    for check in (check_versions, check_drivers, check_host, check_devices, check_bandwidth):
        yield from check()
    if workdir:
        yield from check_workdir(workdir)
    if config is not None:
        yield from check_data(config)
        if buckets(config):
            yield from check_buckets(config, read_metadata("zone"))
