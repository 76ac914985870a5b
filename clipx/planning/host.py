"""Checks whether this host, or all hosts of a run, can train; every fault comes with a fix."""

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from clipx.data.base import Source
from clipx.errors import BadSample, DataError, RunError, install_hint
from clipx.parallel import mesh as meshes
from clipx.parallel import processes
from clipx.parallel.environment import read_metadata
from clipx.training.schema import EvalSpec, data_section
from clipx.training.workdir import prepare_workdir

TPU_LOCK = "/tmp/libtpu_lockfile"
_SLOW = 1e9  # bytes a second; networks between hosts or GPUs that train are faster


class Finding(NamedTuple):
    """The result of one check."""

    what: str  # the subject of the check
    found: str
    mend: str = ""  # how to fix it; "" if nothing is wrong
    fatal: bool = True  # False: `mend` is advice, and training can start without it


def check_versions() -> Iterator[Finding]:
    """Checks the versions of Python, JAX and jaxlib."""
    versions = processes.facts()["versions"]
    yield Finding("versions", ", ".join(f"{name} {version}" for name, version in versions.items()))
    if not (3, 11) <= tuple(map(int, platform.python_version_tuple()[:2])) < (3, 14):
        yield Finding("python", versions["python"], "install Python 3.11, 3.12 or 3.13")
    if versions["jax"] != versions["jaxlib"]:
        yield Finding(
            "jax",
            f"jax {versions['jax']} with jaxlib {versions['jaxlib']}",
            f"install both in one command: {install_hint('cuda', upgrade=True)} (or [tpu])",
            fatal=False,
        )


def _output(*command: str) -> str | None:
    """The output of a program, stripped; None if it is not installed, fails or takes a minute."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def check_drivers() -> Iterator[Finding]:
    """Compares the accelerators of this machine with those that JAX uses."""
    used, wanted = jax.devices()[0].platform, os.environ.get("JAX_PLATFORMS") or "any"
    gpus = _output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    if gpus is not None:
        (line, count), *others = collections.Counter(gpus.splitlines()).most_common() or [("", 0)]
        mend = "" if used == "gpu" or wanted == "cpu" else install_hint("cuda")
        found = f"{count} x {line}" + ("; JAX sees none of them" if mend else "")
        yield Finding("gpu driver", found, mend)
        if others:
            yield Finding("gpu driver", gpus.replace("\n", "; "), "use GPUs of one kind and driver")
    elif shutil.which("nvidia-smi"):
        mend = "reinstall NVIDIA's driver, or restart the host"
        yield Finding("gpu driver", "nvidia-smi fails", mend)
    chips = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
    on_tpu_vm = bool(chips) and "TPU_SKIP_MDS_QUERY" not in os.environ
    if used == "tpu":
        yield Finding("tpu", f"{jax.local_device_count()} chip(s) on this host")
    elif on_tpu_vm and wanted != "cpu":
        yield Finding("tpu", "this host has chips; JAX sees none", install_hint("tpu"))
    if os.path.exists(TPU_LOCK) and used != "tpu" and on_tpu_vm:
        owner = _output("fuser", TPU_LOCK)
        mend = f"end process {owner}" if owner else f"no process holds it: sudo rm {TPU_LOCK}"
        yield Finding("tpu lock", f"{TPU_LOCK} exists, so no other process can use the TPU", mend)
    if not chips and gpus is None:
        yield Finding("accelerator", "none: training runs on the CPU")


def check_host() -> Iterator[Finding]:
    """Checks what feeds the devices: cores, shared memory for loading processes, huge pages."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("cores", f"{cores} for {jax.local_device_count()} device(s) of this process")
    if os.path.isdir("/dev/shm"):
        free = shutil.disk_usage("/dev/shm").free
        mend = "docker run --shm-size=16g, or mount a memory volume" if free < 2**30 else ""
        yield Finding("shared memory", f"{free / 2**30:.1f} GiB free", mend, fatal=False)
    pages = "/sys/kernel/mm/transparent_hugepage/enabled"
    if jax.devices()[0].platform == "tpu" and os.path.exists(pages):
        with open(pages) as file:
            always = "[always]" in file.read()
        mend = "" if always else f"sudo sh -c 'echo always > {pages}' makes starts faster"
        yield Finding("huge pages", "always" if always else "not always", mend, fatal=False)


def check_devices() -> Iterator[Finding]:
    """Lists the devices of all processes, and of each process. The processes have connected, and
    each has as many devices as the others, before this check runs."""
    kinds = collections.Counter(device.device_kind for device in jax.devices())
    total = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    yield Finding("devices", f"{total}, {jax.process_count()} process(es)")
    for process, host in enumerate(processes.hosts()):
        count = sum(device.process_index == process for device in jax.devices())
        yield Finding(f"process {process}", f"{host}: {count} device(s)")
    if len(kinds) > 1:
        mend = "use devices of one kind: every step waits for the slowest"
        yield Finding("devices", total, mend)


def all_reduce(
    devices: Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm]
    size: int = 2**24,
) -> float:
    """Bytes per second that each of n devices sends in an all-reduce of `size` bytes per device.
    Counts 2 (n - 1) / n * `size` bytes per device, as a ring sends. devices: all by default. Raises
    `RunError` if the sum is wrong."""
    mesh = meshes.make_mesh(meshes.MeshConfig(), devices)
    count = mesh.devices.size
    rows = np.broadcast_to(np.arange(1, count + 1, dtype=np.float32)[:, None], (count, size // 4))
    rows = meshes.put(rows, meshes.batch_sharding(mesh))
    total = jax.jit(lambda x: jnp.sum(x, axis=0), out_shardings=meshes.replicated(mesh))
    local = np.asarray(total(rows).addressable_data(0))  # also compiles
    if not (local == count * (count + 1) / 2).all():
        raise RunError(
            f"an all-reduce over {count} device(s) gives a wrong sum: a device or its network is "
            "faulty"
        )
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(total(rows))
        seconds.append(time.perf_counter() - start)
    return 2 * (count - 1) / count * size / statistics.median(seconds)


def check_bandwidth() -> Iterator[Finding]:
    """Measures an all-reduce over all devices, if there are several."""
    if jax.device_count() == 1:
        return
    processes.barrier("doctor: all-reduce")
    platform = jax.devices()[0].platform
    speed = all_reduce(size=2**18 if platform == "cpu" else 2**24)
    slow = speed < _SLOW and platform != "cpu"
    yield Finding(
        "all-reduce",
        f"{speed / 1e9:.3g} GB/s for each of {jax.device_count()} devices",
        "use hosts of one slice or rack; NCCL_DEBUG=INFO prints the network that GPUs use"
        if slow
        else "",
        fatal=False,
    )


def check_workdir(workdir: str) -> Iterator[Finding]:
    """Checks that every process can write to the workdir, and that all processes share it."""
    folder = prepare_workdir(workdir)
    probe = folder / f".doctor_{jax.process_index()}"
    probe.touch()
    processes.barrier("doctor: workdir written")
    visible = [(folder / f".doctor_{i}").exists() for i in range(jax.process_count())]
    processes.barrier("doctor: workdir read")
    probe.unlink()
    free = f"{folder}: {shutil.disk_usage(folder).free / 2**30:,.1f} GiB free"
    if all(visible):
        yield Finding("workdir", free)
    else:
        missing = ", ".join(f"process {i}" for i, seen in enumerate(visible) if not seen)
        mend = "use a folder that all hosts share: NFS, or a mounted bucket"
        yield Finding("workdir", f"{folder}: the files of {missing} are not visible here", mend)


def sources(config: Mapping[str, Any]) -> Iterator[tuple[str, Callable[[], Source]]]:
    """(place in the config, function that opens it) for every data source of a config."""
    if "data" in config:
        yield "config.data", data_section(config["data"])[1].open
    for name, section in config.get("evals", {}).items():
        for field, spec in EvalSpec.check(name, section).sources.items():
            yield f"config.evals.{name} ({field})", spec.open


def check_data(config: Mapping[str, Any]) -> Iterator[Finding]:
    """Opens every data source of a config, and reads up to eight examples of each."""
    for where, start in sources(config):
        begun = time.perf_counter()
        try:
            source = start()
            opened = time.perf_counter()
            rows = np.linspace(0, len(source) - 1, min(len(source), 8)).astype(int)
            for row in rows.tolist():
                source[row]
        except BadSample as error:
            mend = "python -m clipx.dataset verify lists every bad row"
            yield Finding(where, str(error), mend, fatal=False)
            continue
        except DataError as error:
            mend = "fix the data as described; python -m clipx.dataset preview shows it"
            yield Finding(where, str(error), mend)
            continue
        each = (time.perf_counter() - opened) / max(len(rows), 1)
        found = f"{len(source):,} rows; opened in {opened - begun:.1f} s, {each * 1e3:.1f} ms a row"
        yield Finding(where, found)


def buckets(value: Any) -> set[str]:
    """The gs:// buckets in the strings of a config or of a part of it."""
    if isinstance(value, Mapping):
        return set().union(*(buckets(v) for v in value.values()))
    if isinstance(value, (list, tuple)):
        return set().union(*(buckets(v) for v in value))
    return set(re.findall(r"gs://[a-z0-9._-]+", value)) if isinstance(value, str) else set()


def check_buckets(config: Mapping[str, Any], zone: str) -> Iterator[Finding]:
    """Checks that the config's buckets are in this host's region. zone: the host's, as Google's
    metadata server gives it; "" outside of Google Cloud."""
    region = zone.rpartition("/")[2].rpartition("-")[0]
    for bucket in sorted(buckets(config)):
        command = ("gcloud", "storage", "buckets", "describe", bucket, "--format=value(location)")
        location = _output(*command)
        if location is None:
            yield Finding(bucket, "gcloud cannot describe it", "gcloud auth login", fatal=False)
            continue
        location = location.lower()
        near = region == location or region.startswith(f"{location}-")
        near = near or (location == "eu" and region.startswith("europe-"))
        copy = f"gcloud storage cp --recursive {bucket} gs://NAME-IN-{region}"
        mend = "" if near or not region else f"every byte read is charged; {copy}"
        here = f"this host is in {region}" if region else "this host is not in Google Cloud"
        yield Finding(bucket, f"the bucket is in {location}, {here}", mend)


def examine(config: Mapping[str, Any] | None, workdir: str) -> Iterator[Finding]:
    """Yields every finding, in the order in which a run would meet the faults.

    config: its data is checked if given. workdir: checked if not "".
    """
    for check in (check_versions, check_drivers, check_host, check_devices, check_bandwidth):
        yield from check()
    if workdir:
        yield from check_workdir(workdir)
    if config is not None:
        yield from check_data(config)
        if buckets(config):
            yield from check_buckets(config, read_metadata("zone"))
