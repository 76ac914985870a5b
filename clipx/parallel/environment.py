"""Which process of how many this is, read from what started it."""

from __future__ import annotations

import dataclasses
import re
import urllib.error
import urllib.request
from collections.abc import Mapping

from clipx.errors import ConfigError

_EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/"
_TPU_PORT = 8482


@dataclasses.dataclass(frozen=True)
class ProcessInfo:
    """Which of a run's processes this is."""

    address: str  # host:port of process 0
    processes: int
    process: int
    devices: tuple[int, ...] | None  # local device ids that this process owns; None: all
    found: str  # where this was read

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])


def find_process(environment: Mapping[str, str], metadata=None) -> ProcessInfo | None:
    """What the environment says of other processes; None for a single one, which needs nothing.

    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID go before what Open MPI, SLURM
    or a Cloud TPU tell; the launcher for Kubernetes sets those three. `metadata(key)` reads the
    TPU VM's metadata server.
    """
    found, where, devices = {}, "the environment", None
    for read in (_open_mpi, _slurm, lambda e: _tpu(e, metadata or read_metadata)):
        if told := read(environment):
            *values, devices, where = told
            found = dict(zip(_EXPLICIT, values))
            break
    found |= {name: environment[name] for name in _EXPLICIT if environment.get(name)}
    if "JAX_LOCAL_DEVICE_IDS" in environment:
        devices = tuple(int(i) for i in environment["JAX_LOCAL_DEVICE_IDS"].split(","))
    if not found or (str(found.get(_EXPLICIT[1])) == "1" and _EXPLICIT[0] not in environment):
        return None
    expected = "JAX_COORDINATOR_ADDRESS=HOST:PORT and the numbers JAX_NUM_PROCESSES, JAX_PROCESS_ID"
    wrong = [name for name in _EXPLICIT[1:] if not str(found.get(name, "")).isdigit()]
    if not re.fullmatch(r".+:\d+", found.get(_EXPLICIT[0]) or ""):
        wrong.insert(0, _EXPLICIT[0])
    if wrong:
        said = ", ".join(f"{name}={found.get(name) or '(absent)'}" for name in wrong)
        raise ConfigError("environment", said, expected, "all three, or none for a single process")
    address, number, process = found[_EXPLICIT[0]], *(int(found[n]) for n in _EXPLICIT[1:])
    if not process < number:
        raise ConfigError(
            "JAX_PROCESS_ID", str(process), f"less than JAX_NUM_PROCESSES={number}, from 0"
        )
    return ProcessInfo(address, number, process, devices, where)


def _one_device(environment: Mapping[str, str], local: str, several: bool):
    """The device of a process that shares its host with others, unless it is shown only one."""
    shown = environment.get("CUDA_VISIBLE_DEVICES", "several,")
    return (int(local),) if several and "," in shown else None


def _open_mpi(environment: Mapping[str, str]):
    if environment.get("OMPI_COMM_WORLD_SIZE", "1") == "1":
        return None
    rank = environment["OMPI_COMM_WORLD_RANK"]
    job, _, uri = environment.get("OMPI_MCA_orte_hnp_uri", "").partition(".")
    host = re.search(r"tcp://([^,:]+)|tcp6://\[([^,\]]+)", uri)  # of mpirun, where rank 0 is
    address = f"{host[1] or f'[{host[2]}]'}:{_port(int(job) >> 12)}" if host else None
    several = environment.get("OMPI_COMM_WORLD_LOCAL_SIZE", "1") != "1"
    devices = _one_device(environment, environment["OMPI_COMM_WORLD_LOCAL_RANK"], several)
    return address, environment["OMPI_COMM_WORLD_SIZE"], rank, devices, "Open MPI"


def _slurm(environment: Mapping[str, str]):
    needed = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID")
    if any(name not in environment for name in needed) or environment["SLURM_NTASKS"] == "1":
        return None  # not inside srun, or alone
    job, nodes, tasks, rank = (environment[name] for name in needed)
    first = re.match(r"([^,\[]+)(?:\[(\d+))?", nodes)  # gpu[003-007,12],login -> gpu003
    several = int(tasks) > int(environment.get("SLURM_STEP_NUM_NODES", "1"))
    devices = _one_device(environment, environment.get("SLURM_LOCALID", "0"), several)
    return f"{first[1]}{first[2] or ''}:{_port(int(job))}", tasks, rank, devices, "SLURM"


def _port(job: int) -> int:
    """One that no other job on the host is likely to have."""
    return 61440 + job % 4096


def read_metadata(key: str, server: str = METADATA) -> str:
    """What Google's cloud tells this machine of itself; "" elsewhere."""
    request = urllib.request.Request(server + key, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=3) as reply:
            return reply.read().decode()
    except (urllib.error.URLError, OSError):
        return ""


def _tpu(environment: Mapping[str, str], metadata):
    """Hosts of a TPU slice: GKE tells the environment, a TPU VM has its metadata server. Importing
    JAX sets TPU_SKIP_MDS_QUERY where there is no TPU. One worker alone can use its CPU."""
    if environment.get("JAX_PLATFORMS") == "cpu":
        return None
    hosts, worker = environment.get("TPU_WORKER_HOSTNAMES"), environment.get("TPU_WORKER_ID")
    multislice, where = environment, "GKE"
    if not hosts and "TPU_SKIP_MDS_QUERY" not in environment:
        # a host name, or name:id:address, for each worker
        hosts = re.sub(r"[^,]*:", "", metadata("attributes/worker-network-endpoints"))
        worker, where = (
            hosts and metadata("attributes/agent-worker-number"),
            "the TPU VM's metadata",
        )
        told = hosts and metadata("attributes/tpu-env")
        multislice = dict(re.findall(r"^(\w+):\s*'?([^'\n]*)", told, re.MULTILINE)) | environment
    if not hosts:
        return None
    names = [name for name in hosts.split(",") if name]
    slices = int(multislice.get("MEGASCALE_NUM_SLICES") or 1)
    if len(names) * slices < 2 or not str(worker).strip().isdigit():
        return None
    first = multislice.get("MEGASCALE_COORDINATOR_ADDRESS", "").partition(":")[0] or names[0]
    process = int(multislice.get("MEGASCALE_SLICE_ID") or 0) * len(names) + int(worker)
    return f"{first}:{_TPU_PORT}", str(len(names) * slices), str(process), None, where
