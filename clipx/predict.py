"""What a training step needs and takes, from its compiled program: before it runs, or instead."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import re
import tempfile
from collections.abc import Callable
from typing import Any

import jax

from clipx import hlo
from clipx.errors import OutOfMemory
from clipx.parallel import chips
from clipx.parallel.mesh import bytes_held
from clipx.run import Run

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# "Used 27.77G of 15.75G hbm", or "(512.00G) exceeds available HBM (30.75G)"
_SIZE = r"([\d.]+)([KMGT]?)"
_USED = re.compile(rf"Used {_SIZE} of {_SIZE} hbm|\({_SIZE}\) exceeds available HBM \({_SIZE}\)")


@contextlib.contextmanager
def _room():
    """What a compiler says where it has no room becomes an `OutOfMemory`."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise _out_of_memory(str(error)) from None


def _out_of_memory(message: str) -> OutOfMemory:
    """The error, with the bytes that the compiler's message names."""
    found = _USED.search(message)
    sizes = [group for group in found.groups() if group is not None] if found else []
    pairs = zip(sizes[::2], sizes[1::2])
    return OutOfMemory(message, *(int(float(n) * _UNITS.get(unit, 1)) for n, unit in pairs))


def _compile_here(run: Run) -> tuple[jax.stages.Compiled, Callable[[], str]]:
    """The run's step, compiled to be taken, and what gives its program's text."""
    with _room():
        return run.train_step, run.train_step.as_text


def compile_ahead(step: jax.stages.Lowered) -> tuple[jax.stages.Compiled, Callable[[], str]]:
    """A function compiled for TPUs that are not here, and what gives its program's text, which the
    compiler wrote to a file meanwhile: libtpu 0.0.52 cannot print (`as_text`) a program that has a
    SparseCore gather, as steps for v5p and v6e do."""
    with _room(), tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        made = step.compile(compiler_options=options)
        texts = [path.read_text() for path in pathlib.Path(folder).glob("*.after_codegen.txt")]
    return made, (lambda: texts[0]) if len(texts) == 1 else made.as_text


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What is known of a step on one mesh. Memory is in bytes on one device; None: not known."""

    devices: int
    device_kind: str
    batch: int
    microbatches: int
    memory: dict[str, int]  # by kind; what the compiler adds is missing where it found no room
    peak: int | None  # of all kinds but the program
    limit: int | None
    flops: int | None = None  # `Run.model_flops`
    step_flops: int | None = None  # `Run.step_flops`
    bytes: float | None = None  # that one device reads and writes, as the compiler counts them
    cycles: int | None = None  # the compiler's estimates of one device, loops multiplied out
    kernels: float | None = None  # seconds that kernels are charged beside them
    seconds: float | None = None  # without collectives
    collectives: tuple[tuple[str, int, int, int], ...] | None = None  # kind, group, times, bytes
    open_loops: int = 0  # that count once, for their length is not known
    analytic: bool = False  # no compiler was asked
    notes: tuple[str, ...] = ()

    @property
    def need(self) -> int | None:
        """Bytes that have to be there: the step's and its program's."""
        return None if self.peak is None else self.peak + self.memory.get("program", 0)

    @property
    def refused(self) -> bool:
        """Whether the compiler found no room for it."""
        return "program" not in self.memory and not self.analytic

    @property
    def fits(self) -> bool | None:
        if self.refused:
            return False
        return None if self.limit is None or self.need is None else self.need <= self.limit

    @property
    def chip(self) -> chips.Chip | None:
        return chips.chip(self.device_kind)

    @property
    def images_per_second(self) -> float | None:
        return self.batch / self.seconds if self.seconds else None

    @property
    def mfu(self) -> float | None:
        """Useful FLOPs over what the devices could do in that time."""
        if not (self.seconds and self.flops and self.chip):
            return None
        return self.flops / (self.seconds * self.devices * self.chip.tflops * 1e12)

    def as_dict(self) -> dict[str, Any]:
        derived = ("fits", "need", "images_per_second", "mfu")
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in derived}


def held(run: Run) -> dict[str, int]:
    """Bytes on one device of what a step is given, by kind."""
    state = run.state
    return {
        "parameters": bytes_held(state.params),
        "optimizer state": bytes_held(state.opt_state),
        "memory and statistics": bytes_held((state.memory, state.batch_stats, state.step)),
        "batch": bytes_held(run.batch),
    }


def predict(run: Run, *, limit: int | None = None, ahead: bool = False) -> Prediction:
    """What the run's step needs and takes; compiles it if it is not compiled yet. `ahead`: it is
    compiled for devices that are not here, to be looked at and not kept. Does not raise where the
    compiler finds no room: such a prediction does not fit."""
    device = next(iter(run.mesh.local_devices), run.mesh.devices.flat[0])
    chip = chips.chip(device.device_kind)
    limit = memory_limit(device) if limit is None else limit
    known = held(run)
    base = Prediction(
        devices=run.mesh.devices.size,
        device_kind=device.device_kind,
        batch=run.batch_size,
        microbatches=run.microbatches,
        memory=known,
        peak=None,
        limit=limit,
        flops=run.model_flops if chip else None,  # traced again, for what knows no MFU
        step_flops=run.step_flops,
    )
    try:
        step, text = compile_ahead(run.lower()) if ahead else _compile_here(run)
    except OutOfMemory as error:
        return dataclasses.replace(base, peak=error.used, limit=error.limit or limit)
    sizes = step.memory_analysis()
    given = sizes.argument_size_in_bytes
    made = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    tpu = device.platform == "tpu"  # others do not count temporaries in their peak
    peak = sizes.peak_memory_in_bytes if tpu else given + made + sizes.temp_size_in_bytes
    memory = known | {
        "padding": max(given - sum(known.values()), 0),
        "results and temporaries": max(peak - given, 0),
        "program": sizes.generated_code_size_in_bytes,
    }
    return dataclasses.replace(
        base,
        memory=memory,
        peak=peak,
        bytes=_cost(step).get("bytes accessed"),
        **(_estimate(text, chip) if tpu and chip and chip.clock else {}),
    )


def _cost(step: jax.stages.Compiled) -> dict[str, float]:
    cost = step.cost_analysis()
    return (cost[0] if isinstance(cost, list) else cost) or {}


def _estimate(text: Callable[[], str], chip: chips.Chip) -> dict[str, Any]:
    """The compiler's time, and the collectives, from the program's text. A text that cannot be read
    says so and stops nothing."""
    rates = {"peak": chip.tflops * 1e12, "bandwidth": chip.bandwidth * 1e9}
    try:
        program = hlo.read(text())
    except (LookupError, ValueError, jax.errors.JaxRuntimeError) as error:  # the last: as_text
        return {"notes": (f"no estimate of time: {type(error).__name__}: {error}",)}
    beside = f"{len(program.beside)} operation(s) that SparseCores do meanwhile are not timed"
    return {
        "cycles": program.compiler_cycles,
        "kernels": program.charged_seconds(**rates),
        "seconds": program.seconds(**rates, clock=chip.clock * 1e9),
        "collectives": tuple((*key, *value) for key, value in program.traffic().items()),
        "open_loops": len(program.open_loops),
        "notes": (beside,) if program.beside else (),
    }


def memory_limit(device: jax.Device) -> int | None:
    """Bytes that a program may use of a device: what the device says, or the table of chips; of a
    CPU, its share of the machine's."""
    if device.platform == "cpu":
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return pages // jax.local_device_count()
    try:
        told = (device.memory_stats() or {}).get("bytes_limit")
    except jax.errors.JaxRuntimeError:  # a device to compile for, which is not here
        told = None
    chip = chips.chip(device.device_kind)
    return told or (int(chip.memory * 2**30) if chip and chip.memory else None)


def gib(size: float | None) -> str:
    return "?" if size is None else f"{size / 2**30:,.2f} GiB"


def describe_memory(found: Prediction) -> str:
    """`3.84 GiB of 15.75 GiB a device (parameters 0.56, ...)`."""
    parts = [
        f"{name} {size / 2**30:.2f}" for name, size in found.memory.items() if size >= 5 * 2**20
    ]
    limit = f" of {gib(found.limit)}" if found.limit else ""
    inside = f" ({', '.join(parts)})" if parts else ""
    return f"{gib(found.need if found.need is not None else found.peak)}{limit} a device{inside}"


def short(found: Prediction) -> list[str]:
    """What a run says of its step before it takes the first."""
    work, slices = scaled(found.flops or found.step_flops, "FLOP"), found.microbatches
    lines = [f"a step: {work}, {describe_memory(found)}, {slices} micro-batch(es)"]
    if found.seconds:
        mfu = f", {found.mfu:.1%} MFU" if found.mfu else ""
        rate = f"{found.images_per_second:,.0f} images/s{mfu}"
        lines.append(
            f"predicted: {found.seconds:.3g} s a step, {rate} (the compiler's estimate at an "
            "assumed clock, without collectives; not validated)"
        )
    return [*lines, *found.notes]


def scaled(number: float, unit: str) -> str:
    """`4.04 PFLOP`: a number, the prefix of its unit, the unit."""
    for prefix, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {prefix}{unit}"
    return f"{number:.3g} {unit}"


def predicted(found: Prediction) -> dict[str, float]:
    """What metrics.jsonl has beside what is measured."""
    known = {
        "predicted/step_seconds": found.seconds,
        "predicted/memory_gib": None if found.need is None else found.need / 2**30,
        "predicted/mfu": found.mfu,
    }
    return {name: value for name, value in known.items() if value is not None}


def measured(device: jax.Device, found: Prediction, step_seconds: float) -> dict[str, float]:
    """What stands beside it: MFU by the same count, where the device's peak is known, and the most
    memory that the device has had in use, where it tells."""
    known = {}
    if found.flops and found.chip:
        known["mfu"] = dataclasses.replace(found, seconds=step_seconds).mfu
    if told := (device.memory_stats() or {}).get("peak_bytes_in_use"):
        known["memory_gib"] = told / 2**30
    return known
