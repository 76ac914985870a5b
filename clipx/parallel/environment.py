"""Which of a run's processes this is, read from the environment that a launcher set."""

from __future__ import annotations

import dataclasses
import pathlib
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping

from clipx.errors import ConfigError

_EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/"
_TPU_PORT = 8482
_GOOGLE = "0x1ae0"  # the maker of TPUs, on the PCI bus


@dataclasses.dataclass(frozen=True)
class ProcessInfo:
    """Which of a run's processes this is."""

    address: str  # host:port of process 0
    processes: int
    process: int
    devices: tuple[int, ...] | None  # local device ids that this process owns; None: all
    found: str  # which launcher or setting told it, for messages

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])


def has_accelerator(root: str = "/") -> bool:
    """Whether this machine has a GPU or a TPU, by its device files and its PCI bus.

    root: the folder that has `dev` and `sys`.
    """
    files = ("dev/accel[0-9]*", "dev/vfio/[0-9]*", "dev/nvidia[0-9]*", "dev/kfd", "dev/dxg")
    folder = pathlib.Path(root)
    if any(True for pattern in files for _ in folder.glob(pattern)):
        return True
    vendors = folder.glob("sys/bus/pci/devices/*/vendor")
    return any(file.read_text().strip() == _GOOGLE for file in vendors)


def find_process(
    environment: Mapping[str, str], metadata: Callable[[str], str] | None = None
) -> ProcessInfo | None:
    """Which process this is, from environment variables; None for a run of one process.

    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, which the launcher for Kubernetes
    sets, override what Open MPI, SLURM or a Cloud TPU report. `metadata(key)` reads the TPU VM's
    metadata server (default: `read_metadata`). Raises `ConfigError` for incomplete or impossible
    values.
    """
    values: dict[str, str] = {}
    where, devices = "the environment", None
    for read in (_open_mpi, _slurm, lambda e: _tpu(e, metadata or read_metadata)):
        if reported := read(environment):
            address, processes, process, devices, where = reported
            values = dict(zip(_EXPLICIT, (address or "", processes, process)))
            break
    values |= {name: environment[name] for name in _EXPLICIT if environment.get(name)}
    if "JAX_LOCAL_DEVICE_IDS" in environment:
        devices = tuple(int(i) for i in environment["JAX_LOCAL_DEVICE_IDS"].split(","))
    if not values or (values.get(_EXPLICIT[1]) == "1" and _EXPLICIT[0] not in environment):
        return None
    expected = "JAX_COORDINATOR_ADDRESS=HOST:PORT and the numbers JAX_NUM_PROCESSES, JAX_PROCESS_ID"
    wrong = [name for name in _EXPLICIT[1:] if not values.get(name, "").isdigit()]
    if not re.fullmatch(r".+:\d+", values.get(_EXPLICIT[0], "")):
        wrong.insert(0, _EXPLICIT[0])
    if wrong:
        faults = ", ".join(f"{name}={values.get(name) or '(absent)'}" for name in wrong)
        fix = "set all three, or none for a single process"
        raise ConfigError("environment", faults, expected, fix)
    address, number, process = values[_EXPLICIT[0]], *(int(values[n]) for n in _EXPLICIT[1:])
    if not process < number:
        raise ConfigError(
            "JAX_PROCESS_ID", str(process), f"at least 0 and less than JAX_NUM_PROCESSES={number}"
        )
    return ProcessInfo(address, number, process, devices, where)


# Address of process 0 (None if unknown), number of processes, this process, its local device ids
# (None: all), and the launcher's name
_Reported = tuple[str | None, str, str, tuple[int, ...] | None, str]


def _one_device(
    environment: Mapping[str, str], local: str, several: bool
) -> tuple[int, ...] | None:
    """The device number `local` if `several` processes share the host; None (all devices) if not,
    or if the launcher shows this process only one device."""
    shown = environment.get("CUDA_VISIBLE_DEVICES", "several,")
    return (int(local),) if several and "," in shown else None


def _open_mpi(environment: Mapping[str, str]) -> _Reported | None:
    if environment.get("OMPI_COMM_WORLD_SIZE", "1") == "1":
        return None
    rank = environment["OMPI_COMM_WORLD_RANK"]
    job, _, uri = environment.get("OMPI_MCA_orte_hnp_uri", "").partition(".")
    host = re.search(r"tcp://([^,:]+)|tcp6://\[([^,\]]+)", uri)  # the host of mpirun and of rank 0
    address = f"{host[1] or f'[{host[2]}]'}:{_port(int(job) >> 12)}" if host else None
    several = environment.get("OMPI_COMM_WORLD_LOCAL_SIZE", "1") != "1"
    devices = _one_device(environment, environment["OMPI_COMM_WORLD_LOCAL_RANK"], several)
    return address, environment["OMPI_COMM_WORLD_SIZE"], rank, devices, "Open MPI"


def _slurm(environment: Mapping[str, str]) -> _Reported | None:
    needed = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID")
    if any(name not in environment for name in needed) or environment["SLURM_NTASKS"] == "1":
        return None  # not inside srun, or one task
    job, nodes, tasks, rank = (environment[name] for name in needed)
    first = re.match(r"([^,\[]+)(?:\[(\d+))?", nodes)  # gpu[003-007,12],login -> gpu003
    assert first is not None, nodes
    several = int(tasks) > int(environment.get("SLURM_STEP_NUM_NODES", "1"))
    devices = _one_device(environment, environment.get("SLURM_LOCALID", "0"), several)
    return f"{first[1]}{first[2] or ''}:{_port(int(job))}", tasks, rank, devices, "SLURM"


def _port(job: int) -> int:
    """A port that other jobs on the host are unlikely to use."""
    return 61440 + job % 4096


def read_metadata(key: str, server: str = METADATA) -> str:
    """The value of `key` on the metadata server of Google's cloud; "" on other machines."""
    request = urllib.request.Request(server + key, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=3) as reply:
            return reply.read().decode()
    except (urllib.error.URLError, OSError):
        return ""


def _tpu(environment: Mapping[str, str], metadata: Callable[[str], str]) -> _Reported | None:
    """The process of a host of a TPU slice. GKE sets environment variables; a TPU VM has a metadata
    server. Importing JAX sets TPU_SKIP_MDS_QUERY on machines without a TPU. JAX_PLATFORMS=cpu lets
    a single worker use its CPU."""
    if environment.get("JAX_PLATFORMS") == "cpu":
        return None
    hosts, worker = environment.get("TPU_WORKER_HOSTNAMES"), environment.get("TPU_WORKER_ID")
    multislice, where = dict(environment), "GKE"
    if not hosts and "TPU_SKIP_MDS_QUERY" not in environment:
        # for each worker a host name, or name:id:address
        hosts = re.sub(r"[^,]*:", "", metadata("attributes/worker-network-endpoints"))
        worker = hosts and metadata("attributes/agent-worker-number")
        where = "the TPU VM's metadata"
        lines = hosts and metadata("attributes/tpu-env")
        multislice = dict(re.findall(r"^(\w+):\s*'?([^'\n]*)", lines, re.MULTILINE)) | multislice
    if not hosts:
        return None
    names = [name for name in hosts.split(",") if name]
    slices = int(multislice.get("MEGASCALE_NUM_SLICES") or 1)
    if len(names) * slices < 2 or worker is None or not worker.strip().isdigit():
        return None
    first = multislice.get("MEGASCALE_COORDINATOR_ADDRESS", "").partition(":")[0] or names[0]
    process = int(multislice.get("MEGASCALE_SLICE_ID") or 0) * len(names) + int(worker)
    return f"{first}:{_TPU_PORT}", str(len(names) * slices), str(process), None, where
