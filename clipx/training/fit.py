"""Whether a step fits its devices, from shapes and the compiler's memory analysis alone."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
from collections.abc import Callable
from typing import Any

import jax

from clipx.errors import ConfigError, OutOfMemory
from clipx.parallel import chips
from clipx.parallel.mesh import bytes_held
from clipx.training.run import Run

_WAITING = 2  # batches on the devices beside the step's own
_MARGIN = 0.95  # of a device's memory: evals and fragments have the rest
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# "Used 27.77G of 15.75G hbm", or "(512.00G) exceeds available HBM (30.75G)"
_SIZE = r"([\d.]+)([KMGT]?)"
_USED = re.compile(rf"Used {_SIZE} of {_SIZE} hbm|\({_SIZE}\) exceeds available HBM \({_SIZE}\)")


@dataclasses.dataclass(frozen=True)
class Needs:
    """What a step needs of each device of one mesh. Memory is in bytes; None: not known."""

    devices: int
    device_kind: str
    batch: int
    microbatches: int
    memory: dict[str, int]  # by kind; what the compiler adds is missing where it found no room
    peak: int | None  # of all kinds but the program
    limit: int | None
    flops: int | None = None  # `Run.model_flops`
    step_flops: int | None = None  # `Run.step_flops`

    @property
    def need(self) -> int | None:
        """Bytes that have to be there: the step's and its program's."""
        return None if self.peak is None else self.peak + self.memory.get("program", 0)

    @property
    def refused(self) -> bool:
        """Whether the compiler found no room for it."""
        return "program" not in self.memory

    @property
    def fits(self) -> bool | None:
        if self.refused:
            return False
        return None if self.limit is None or self.need is None else self.need <= self.limit

    @property
    def chip(self) -> chips.Chip | None:
        return chips.chip(self.device_kind)

    def mfu(self, step_seconds: float) -> float | None:
        """Useful FLOPs over what the devices could do in that time; None where either is not
        known."""
        if not (self.flops and self.chip):
            return None
        return self.flops / (step_seconds * self.devices * self.chip.tflops * 1e12)


@contextlib.contextmanager
def room():
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


def held(run: Run) -> dict[str, int]:
    """Bytes on one device of what a step is given, by kind."""
    state = run.state
    return {
        "parameters": bytes_held(state.params),
        "optimizer state": bytes_held(state.opt_state),
        "memory and statistics": bytes_held((state.memory, state.batch_stats, state.step)),
        "batch": bytes_held(run.batch),
    }


def given(run: Run, *, limit: int | None = None) -> Needs:
    """What is known before anything is compiled. `limit`: in place of the device's own."""
    device = some_device(run)
    return Needs(
        devices=run.mesh.devices.size,
        device_kind=device.device_kind,
        batch=run.batch_size,
        microbatches=run.microbatches,
        memory=held(run),
        peak=None,
        limit=memory_limit(device) if limit is None else limit,
        # traced again, for what knows no MFU
        flops=run.model_flops if chips.chip(device.device_kind) else None,
        step_flops=run.step_flops,
    )


def some_device(run: Run) -> jax.Device:
    """One of the run's mesh, of this process where it has any."""
    return next(iter(run.mesh.local_devices), run.mesh.devices.flat[0])


def measure(run: Run, *, limit: int | None = None) -> Needs:
    """What the run's step needs; compiles it if it is not compiled yet. Does not raise where the
    compiler finds no room: such a step does not fit."""
    base = given(run, limit=limit)
    try:
        with room():
            step = run.train_step
    except OutOfMemory as error:
        return dataclasses.replace(base, peak=error.used, limit=error.limit or base.limit)
    return with_compiled(base, step, some_device(run).platform)


def with_compiled(base: Needs, step: jax.stages.Compiled, platform: str) -> Needs:
    """`base` with what the compiler adds: padding, results and temporaries, the program."""
    sizes = step.memory_analysis()
    arguments = sizes.argument_size_in_bytes
    made = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    peak = sizes.peak_memory_in_bytes
    if platform != "tpu":  # others do not count temporaries in their peak
        peak = arguments + made + sizes.temp_size_in_bytes
    memory = base.memory | {
        "padding": max(arguments - sum(base.memory.values()), 0),
        "results and temporaries": max(peak - arguments, 0),
        "program": sizes.generated_code_size_in_bytes,
    }
    return dataclasses.replace(base, memory=memory, peak=peak)


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


def describe_memory(found: Needs) -> str:
    """`3.84 GiB of 15.75 GiB a device (parameters 0.56, ...)`."""
    parts = [
        f"{name} {size / 2**30:.2f}" for name, size in found.memory.items() if size >= 5 * 2**20
    ]
    limit = f" of {gib(found.limit)}" if found.limit else ""
    inside = f" ({', '.join(parts)})" if parts else ""
    return f"{gib(found.need if found.need is not None else found.peak)}{limit} a device{inside}"


def describe(found: Needs) -> str:
    """What a run says of its step before it takes the first, in one line."""
    work = scaled(found.flops or found.step_flops, "FLOP")
    return f"a step: {work}, {describe_memory(found)}, {found.microbatches} micro-batch(es)"


def scaled(number: float, unit: str) -> str:
    """`4.04 PFLOP`: a number, the prefix of its unit, the unit."""
    for prefix, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {prefix}{unit}"
    return f"{number:.3g} {unit}"


def logged(found: Needs | None) -> dict[str, float]:
    """What metrics.jsonl has of it beside what is measured."""
    if found is None or found.need is None:
        return {}
    return {"predicted/memory_gib": found.need / 2**30}


def measured(device: jax.Device, found: Needs, step_seconds: float) -> dict[str, float]:
    """What stands beside it: MFU, where the device's peak is known, and the most memory that the
    device has had in use, where it tells."""
    known = {}
    if (mfu := found.mfu(step_seconds)) is not None:
        known["mfu"] = mfu
    if told := (device.memory_stats() or {}).get("peak_bytes_in_use"):
        known["memory_gib"] = told / 2**30
    return known


def counts(run: Run) -> list[int]:
    """The numbers of micro-batches that the batch divides into, ascending."""
    rows = run.batch_size // math.prod(run.mesh.shape[a] for a in ("data", "fsdp"))
    return [n for n in range(1, rows + 1) if rows % n == 0]


def fewest(
    run: Run,
    fits: Callable[[Needs], bool],
    tell: Callable[[Needs], None] = lambda _: None,
    estimate: Callable[[Run], Needs] | None = None,
) -> tuple[Run, Needs] | None:
    """The run with the fewest micro-batches that fit, its step compiled, and what is predicted of
    it; None where no number does. Every prediction made on the way is told.

    A step's temporaries are about inversely as many, which says where to look; from there it goes
    on number by number until one that fits has one below that does not.
    """
    numbers, tried = counts(run), {}

    def trial(place: int) -> bool:
        if place not in tried:
            other = run.with_microbatches(numbers[place])
            tried[place] = other, (estimate or measure)(other)
            tell(tried[place][1])
        return fits(tried[place][1])

    if trial(0):
        return tried[0]
    first = tried[0][1]
    place = min(1, len(numbers) - 1)
    if first.peak and first.limit:
        fixed = sum(held(run).values())
        wanted = (first.peak - fixed) / max(first.limit - fixed, 1)
        place = next((i for i, n in enumerate(numbers) if i and n >= wanted), len(numbers) - 1)
    if len(numbers) == 1:
        return None
    if trial(place):
        while place > 1 and trial(place - 1):
            place -= 1
        return tried[place]
    while place + 1 < len(numbers):
        place += 1
        if trial(place):
            return tried[place]
    return None


def fitted(
    run: Run,
    *,
    agreed: Callable[[bool], bool] = bool,
    tell: Callable[[Needs], None] = lambda _: None,
) -> Run:
    """The run, with a number in place of `train.microbatches=auto`: the smallest whose step, the
    batches that wait for it and a margin of 5 % fit the devices' memory, from compiled figures; 1
    where that memory is not known. `agreed` makes one answer of all processes'.

    Raises `ConfigError` where no number fits, and for towers with BatchNorm, whose statistics would
    be another slice's, unless one micro-batch fits.
    """
    if run.config.train.microbatches != "auto":
        return run
    waiting = _WAITING * bytes_held(run.batch)

    def fits(found: Needs) -> bool:
        if found.peak is None or found.fits is False:
            return agreed(False)
        return agreed(found.limit is None or found.need + waiting <= _MARGIN * found.limit)

    where, exact = "config.train.microbatches", not {"image", "text"} & set(run.state.batch_stats)
    if not exact:
        one = run.with_microbatches(1)
        if fits(measure(one)):
            return one
        raise ConfigError(
            where,
            "'auto', towers with BatchNorm, and a batch that does not fit at once",
            "a number: their statistics are those of a micro-batch, so it changes the run",
            f"{where}=2, or a smaller batch",
        )
    found = fewest(run, fits, tell)
    if found is None:
        raise ConfigError(
            where,
            f"'auto', and not even {counts(run)[-1]} fit: {describe_memory(measure(run))}",
            "a state and a batch that fit",
            "config.mesh.fsdp spreads the state, image.remat and text.remat recompute more",
        )
    return found[0]


def mesh_known(run: Run) -> dict[str, Any]:
    """What `train.microbatches=auto` is resolved for, as a checkpoint keeps it."""
    return {"axes": dict(run.mesh.shape), "device": run.mesh.devices.flat[0].device_kind}
