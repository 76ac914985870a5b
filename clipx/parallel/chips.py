"""Chips, and names of many of them: `v5e:16x16`, `2xv5p:4x4x4`, `h100:8x8`.

A topology of TPUs comes up as devices that programs can be compiled for and nothing can run on, on
a machine without any; one of GPUs is a count and a row of this table.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib.util
import math
import os
import re
from typing import NamedTuple

import jax

from clipx.errors import ConfigError, install_hint


class Chip(NamedTuple):
    """What is known of a kind of device; None: not known."""

    tflops: float  # published dense peak, see below
    memory: float | None = None  # GiB of its memory that a program may use
    bandwidth: float | None = None  # GB/s to and from it, published
    clock: float | None = None  # GHz; assumed: what the peak and the number of MXUs imply
    link: float | None = None  # GB/s out of one GPU to those of its node, and
    network: float | None = None  # of other nodes, published


# By `device_kind`. Peaks are dense, in bfloat16 with float32 accumulation, without sparsity, per
# JAX device; for T4 and V100, which have no bfloat16, in float16. A TPU v2 or v3 device is one of
# its chip's two cores. From NVIDIA's data sheets and architecture papers, and Google Cloud's TPU
# system pages; a TPU's memory is what its compiler says that it has.
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

# What a topology may be of: the device's kind, and layouts to suggest.
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
_MEGACORE = ("v4",)  # a device is both cores of a chip, as on the hardware; v5p comes up so


def chip(device_kind: str) -> Chip | None:
    """What is known of a kind of device; None where nothing is."""
    found = (c for pattern, c in _CHIPS.items() if re.fullmatch(pattern, device_kind))
    return next(found, None)


@dataclasses.dataclass(frozen=True)
class Topology:
    """So many slices of one layout of chips of one kind. `name` as it was given."""

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
        return chip(self.device_kind)

    @property
    def size(self) -> int:
        """Chips, each of which is one device."""
        return self.slices * math.prod(map(int, self.layout.split("x")))

    def devices(self) -> list[jax.Device]:
        """Devices to compile for, of TPUs alone. Raises `ConfigError` without libtpu, and for a
        layout that its chips do not come in."""
        if importlib.util.find_spec("libtpu") is None:
            raise ConfigError(
                f"--topology={self.name}",
                "no libtpu here",
                "the TPU's compiler, which needs no TPU",
                install_hint("tpu"),
            )
        # no metadata server to ask, no other process's lock to wait for, no host to look for
        for name, value in {
            "TPU_SKIP_MDS_QUERY": "1",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "TPU_ACCELERATOR_TYPE": "v5litepod-4",
            "TPU_WORKER_HOSTNAMES": "localhost",
        }.items():
            os.environ.setdefault(name, value)
        from jax.experimental import topologies

        options = {"chip_config_name": "megacore"} if self.kind in _MEGACORE else {}
        if self.layout == "1x1":
            options["chips_per_host_bounds"] = (1, 1, 1)
        if self.slices > 1:
            options["num_slices"] = self.slices
        try:
            found = topologies.get_topology_desc(
                f"{self.kind}:{self.layout}", platform="tpu", **options
            )
        except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(
                "--topology",
                f"{self.name!r} ({reason})",
                f"a layout that {self.kind} comes in: {', '.join(_KINDS[self.kind][1])}, ...",
                _mend(self.kind, self.layout),
            ) from None
        _read_flags(found.devices[0])
        return list(found.devices)


@functools.cache
def _read_flags(device: jax.Device) -> None:
    """Has libtpu read XLA_FLAGS, which it does as it first compiles, without what is other
    compilers': it ends the process at a flag that it does not know."""
    before = os.environ.get("XLA_FLAGS", "")
    jax.local_devices(backend="cpu")  # whose compiler has read all of them now
    kept = [flag for flag in before.split() if not re.match("--xla_[cg]pu_", flag)]
    if kept == before.split():
        return
    os.environ["XLA_FLAGS"] = " ".join(kept)
    least = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", math.inf)  # for none to read
    try:
        x = jax.ShapeDtypeStruct((), "float32", sharding=jax.sharding.SingleDeviceSharding(device))
        jax.jit(abs).lower(x).compile()
    finally:
        os.environ["XLA_FLAGS"] = before
        jax.config.update("jax_persistent_cache_min_compile_time_secs", least)


def _mend(kind: str, layout: str) -> str:
    """The known layout of that kind nearest in chips."""
    sides = [int(side) for side in re.findall(r"\d+", layout)] or [16]
    known = _KINDS[kind][1]

    def distance(name):
        return abs(
            math.log(math.prod(map(int, name.split("x")))) - math.log(max(math.prod(sides), 1))
        )

    return f"did you mean '{kind}:{min(known, key=distance)}'?"


def parse(name: str) -> Topology:
    """The topology of a name, `[SLICESx]KIND:LAYOUT`, with no library asked yet. Raises
    `ConfigError`, with the nearest name, for one that is not known."""
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
            f"a topology of {', '.join(_KINDS)}",
            _mend(near, name.partition(":")[2]),
        )
    sides = len(_KINDS[kind][1][0].split("x"))
    if not match or layout.count("x") + 1 != sides or "0" in layout.split("x") or slices == "0":
        what = "nodes x GPUs" if not kind.startswith("v") else f"{sides} sides"
        expected = f"{kind}:{_KINDS[kind][1][-2]}, or another layout of {what}"
        raise ConfigError("--topology", repr(name), expected, _mend(kind, layout))
    if slices and not kind.startswith("v"):
        raise ConfigError(
            "--topology", repr(name), "nodes instead of slices", f"did you mean '{kind}:{layout}'?"
        )
    return Topology(name.strip(), kind, layout, int(slices or 1))
