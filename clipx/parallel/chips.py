"""What is known of accelerator chips, and names of topologies: `v5e:16x16`, `2xv5p:4x4x4`,
`h100:8x8`.

A TPU topology gives devices that programs can be compiled for, but not run on, on a machine without
TPUs. A GPU topology is only a device count and a row of the table of chips.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib.util
import math
import os
import re
from typing import Any, NamedTuple

import jax

from clipx.errors import ConfigError, install_hint


class Chip(NamedTuple):
    """Published numbers of a kind of device; None: not known."""

    tflops: float  # dense peak in TFLOP/s, see below
    memory: float | None = None  # GiB that a program may use
    bandwidth: float | None = None  # GB/s of that memory, published
    clock: float | None = None  # GHz; derived from the peak and the number of MXUs
    link: float | None = None  # GB/s from one GPU to the other GPUs of its node, published
    network: float | None = None  # GB/s from one GPU to other nodes, published


# Keys are patterns of JAX's `device_kind`. Peaks are per JAX device, without sparsity, in bfloat16
# with float32 accumulation; in float16 for T4 and V100, which have no bfloat16. A device of TPU v2
# or v3 is one of its chip's two cores. Sources: NVIDIA's data sheets and architecture papers, and
# Google Cloud's TPU system pages. A TPU's memory is the size that its compiler reports.
_CHIPS = {
    r"(NVIDIA )?A100-(SXM4|PCIE)-40GB": Chip(312, 39.4, 1555),
    r"(NVIDIA )?A100[- ](SXM4-80GB|80GB PCIe)": Chip(312, 79.1, 1935, None, 300, 25),
    r"NVIDIA H100 PCIe": Chip(756, 79.1, 2000),
    r"NVIDIA H(100|200) NVL": Chip(835),
    r"NVIDIA H100 80GB HBM3": Chip(989, 79.1, 3350, None, 450, 50),
    r"NVIDIA H200": Chip(989, 139.8, 4800, None, 450, 50),
    r"NVIDIA GB200": Chip(2500),
    r"NVIDIA B200": Chip(2250),
    r"NVIDIA L4": Chip(121),
    r"(Tesla|NVIDIA) T4": Chip(65),
    r"(Tesla|NVIDIA) V100-PCIE.*": Chip(112),
    r"(Tesla|NVIDIA) V100-SXM.*": Chip(125),
    r"NVIDIA GeForce RTX 4090": Chip(165.2),
    r"NVIDIA GeForce RTX 3090": Chip(71),
    r"TPU v2": Chip(22.5),
    r"TPU v3": Chip(61.5),
    r"TPU v4": Chip(275, 30.75, 1228, 1.05),
    r"TPU v5 ?(lite|e)": Chip(197, 15.75, 819, 1.5),
    r"TPU v5p?": Chip(459, 95.73, 2765, 1.75),
    r"TPU v6 ?(lite|e)": Chip(918, 31.24, 1640, 1.75),
}

# Kinds of chips in topology names: the `device_kind`, and layouts that error messages suggest.
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBE = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16")
_NODES = ("1x1", "1x8", "2x8", "4x8", "8x8", "16x8", "32x8")
_KINDS = {
    "v4": ("TPU v4", _CUBE),
    "v5e": ("TPU v5 lite", _FLAT),
    "v5p": ("TPU v5", _CUBE),
    "v6e": ("TPU v6 lite", _FLAT),
    "a100": ("NVIDIA A100-SXM4-80GB", _NODES),
    "h100": ("NVIDIA H100 80GB HBM3", _NODES),
    "h200": ("NVIDIA H200", _NODES),
}
_MEGACORE = ("v4",)  # libtpu must be asked for one device per chip, as on the hardware


def chip(device_kind: str) -> Chip | None:
    """The published numbers of a `device_kind`; None for an unknown one."""
    matches = (c for pattern, c in _CHIPS.items() if re.fullmatch(pattern, device_kind))
    return next(matches, None)


@dataclasses.dataclass(frozen=True)
class Topology:
    """`slices` slices of chips of one kind in one layout. `name` is the name as given."""

    name: str
    kind: str  # a key of `_KINDS`
    layout: str  # TPUs: chips along each axis of the torus; GPUs: nodes x GPUs
    slices: int = 1

    @property
    def gpu(self) -> bool:
        return not self.kind.startswith("v")

    @property
    def device_kind(self) -> str:
        return _KINDS[self.kind][0]

    @property
    def chip(self) -> Chip:
        known = chip(self.device_kind)
        assert known is not None  # every entry of `_KINDS` is in `_CHIPS`
        return known

    @property
    def size(self) -> int:
        """The number of chips. Each chip is one device."""
        return self.slices * math.prod(map(int, self.layout.split("x")))

    def devices(self) -> list[jax.Device]:  # pyright: ignore[reportInvalidTypeForm]
        """Devices to compile for, for a TPU topology. Raises `ConfigError` without libtpu, and for
        a layout that these chips do not come in."""
        if importlib.util.find_spec("libtpu") is None:
            raise ConfigError(
                f"--topology={self.name}",
                "no libtpu in this environment",
                "libtpu, the TPU's compiler, which runs without a TPU",
                install_hint("tpu"),
            )
        # so that libtpu asks no metadata server, waits for no lock and looks for no other host
        for name, value in {
            "TPU_SKIP_MDS_QUERY": "1",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "TPU_ACCELERATOR_TYPE": "v5litepod-4",
            "TPU_WORKER_HOSTNAMES": "localhost",
        }.items():
            os.environ.setdefault(name, value)
        from jax.experimental import topologies

        options: dict[str, Any] = {"chip_config_name": "megacore"} if self.kind in _MEGACORE else {}
        if self.layout == "1x1":
            options["chips_per_host_bounds"] = (1, 1, 1)
        if self.slices > 1:
            options["num_slices"] = self.slices
        try:
            topology = topologies.get_topology_desc(
                f"{self.kind}:{self.layout}", platform="tpu", **options
            )
        except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(
                "--topology",
                f"{self.name!r} ({reason})",
                f"a layout that {self.kind} comes in: {', '.join(_KINDS[self.kind][1])}, ...",
                _suggestion(self.kind, self.layout),
            ) from None
        _read_flags(topology.devices[0])
        return list(topology.devices)


@functools.cache
def _read_flags(device: jax.Device) -> None:  # pyright: ignore[reportInvalidTypeForm]
    """Makes libtpu read XLA_FLAGS without the flags of CPUs and GPUs.

    libtpu reads XLA_FLAGS when it first compiles, and ends the process at a flag that it does not
    know. So this compiles a trivial program while the variable lacks those flags.
    """
    before = os.environ.get("XLA_FLAGS", "")
    jax.local_devices(backend="cpu")  # makes the CPU's compiler read all flags before they change
    kept = [flag for flag in before.split() if not re.match("--xla_[cg]pu_", flag)]
    if kept == before.split():
        return
    os.environ["XLA_FLAGS"] = " ".join(kept)
    setting = "jax_persistent_cache_min_compile_time_secs"
    min_seconds = getattr(jax.config, setting)
    jax.config.update(setting, math.inf)  # no cache entry for a program of absent hardware
    try:
        x = jax.ShapeDtypeStruct((), "float32", sharding=jax.sharding.SingleDeviceSharding(device))
        jax.jit(abs).lower(x).compile()
    finally:
        os.environ["XLA_FLAGS"] = before
        jax.config.update(setting, min_seconds)


def _suggestion(kind: str, layout: str) -> str:
    """A hint that names the known layout of that kind with the nearest number of chips."""
    sides = [int(side) for side in re.findall(r"\d+", layout)] or [16]
    known = _KINDS[kind][1]

    def distance(name: str) -> float:
        chips = math.prod(map(int, name.split("x")))
        return abs(math.log(chips) - math.log(max(math.prod(sides), 1)))

    return f"did you mean '{kind}:{min(known, key=distance)}'?"


def parse(name: str) -> Topology:
    """The topology of a name, `[SLICESx]KIND:LAYOUT`. Needs no libtpu. Raises `ConfigError`, with
    the nearest known name, for an unknown one."""
    match = re.fullmatch(r"(?:(\d+)x)?([a-z]\w*):(\d+(?:x\d+)*)", name.strip())
    slices, kind, layout = match.groups() if match else (None, name.partition(":")[0], "")
    if kind not in _KINDS:
        bare = re.sub(r"^\d+x", "", kind).lower()
        near = (difflib.get_close_matches(bare, _KINDS, n=1, cutoff=0.4) or ["v5e"])[0]
        if re.match(r"v5lite", bare):
            near = "v5e"
        raise ConfigError(
            "--topology",
            repr(name),
            f"[SLICESx]KIND:LAYOUT with a kind of {', '.join(_KINDS)}",
            _suggestion(near, name.partition(":")[2]),
        )
    sides = len(_KINDS[kind][1][0].split("x"))
    if not match or layout.count("x") + 1 != sides or "0" in layout.split("x") or slices == "0":
        form = "nodes x GPUs" if not kind.startswith("v") else f"{sides} sides"
        expected = f"{kind}:{_KINDS[kind][1][-2]}, or another layout of {form}"
        raise ConfigError("--topology", repr(name), expected, _suggestion(kind, layout))
    if slices and not kind.startswith("v"):
        raise ConfigError(
            "--topology",
            repr(name),
            "no SLICESx: GPUs have nodes",
            f"did you mean '{kind}:{layout}'?",
        )
    return Topology(name.strip(), kind, layout, int(slices or 1))
