"""Whether a training step fits its devices, from shapes and the compiler's memory analysis."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax

from clipx.errors import ConfigError, OutOfMemory
from clipx.parallel import chips
from clipx.parallel.mesh import bytes_held
from clipx.training.run import Run
from clipx.types import Device

R = TypeVar("R", bound=Run)


_WAITING = 2  # batches that wait on the devices, beside the step's own
_MARGIN = 0.95  # share of a device's memory for a step; evals and fragmentation need the rest
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# "Used 27.77G of 15.75G hbm", or "(512.00G) exceeds available HBM (30.75G)"
_SIZE = r"([\d.]+)([KMGT]?)"
_USED = re.compile(rf"Used {_SIZE} of {_SIZE} hbm|\({_SIZE}\) exceeds available HBM \({_SIZE}\)")


@dataclasses.dataclass(frozen=True)
class Needs:
    """The memory that a step needs on each device of a mesh, in bytes, and its FLOPs.

    None stands for an unknown number.
    """

    devices: int
    device_kind: str
    batch: int
    microbatches: int
    memory: dict[str, int]  # by kind; without the compiler's kinds if the step did not compile
    peak: int | None  # of all kinds but "program"
    limit: int | None  # memory of the device
    flops: int | None = None  # `Run.model_flops`
    step_flops: int | None = None  # `Run.step_flops`
    pair_flops: float | None = None  # `Run.pair_flops`

    @property
    def need(self) -> int | None:
        """The peak plus the compiled program."""
        return None if self.peak is None else self.peak + self.memory.get("program", 0)

    @property
    def refused(self) -> bool:
        """Whether the compiler refused the step for lack of memory."""
        return "program" not in self.memory

    @property
    def fits(self) -> bool | None:
        """Whether the step fits the device; None if that is not known."""
        if self.refused:
            return False
        return None if self.limit is None or self.need is None else self.need <= self.limit

    @property
    def chip(self) -> chips.Chip | None:
        """The device's entry in the table of chips; None for a kind that is not there."""
        return chips.chip(self.device_kind)

    def mfu(self, step_seconds: float) -> float | None:
        """Model FLOPs utilisation: useful FLOPs over the devices' peak in `step_seconds`. None if
        either is not known."""
        if not (self.flops and self.chip):
            return None
        return self.flops / (step_seconds * self.devices * self.chip.tflops * 1e12)


@contextlib.contextmanager
def room() -> Iterator[None]:
    """Turns a compiler's out-of-memory error into `OutOfMemory`."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise _out_of_memory(str(error)) from None


def _out_of_memory(message: str) -> OutOfMemory:
    """The error, with the sizes that the compiler's message names."""
    match = _USED.search(message)
    groups = [group for group in match.groups() if group is not None] if match else []
    sizes = zip(groups[::2], groups[1::2])
    return OutOfMemory(message, *(int(float(n) * _UNITS.get(unit, 1)) for n, unit in sizes))


def held(run: Run) -> dict[str, int]:
    """Bytes of a step's arguments on one device, by kind."""
    state = run.state
    return {
        "parameters": bytes_held(state.params),
        "optimizer state": bytes_held(state.opt_state),
        "memory and statistics": bytes_held((state.memory, state.batch_stats, state.step)),
        "batch": bytes_held(run.batch),
    }


def given(run: Run, *, limit: int | None = None) -> Needs:
    """The needs of the run's step that are known without compiling it.

    limit: bytes to take in place of the device's own memory.
    """
    device = some_device(run)
    return Needs(
        devices=run.mesh.devices.size,
        device_kind=device.device_kind,
        batch=run.batch_size,
        microbatches=run.microbatches,
        memory=held(run),
        peak=None,
        limit=memory_limit(device) if limit is None else limit,
        # only MFU needs them, and they take another trace
        flops=run.model_flops if chips.chip(device.device_kind) else None,
        step_flops=run.step_flops,
        pair_flops=run.pair_flops,
    )


def some_device(run: Run) -> Device:
    """A device of the run's mesh, one of this process if it has any."""
    return next(iter(run.mesh.local_devices), run.mesh.devices.flat[0])


def measure(run: Run, *, limit: int | None = None) -> Needs:
    """The needs of the run's step. Compiles the step if it is not compiled yet.

    A step that the compiler refuses for lack of memory raises nothing: the needs are `refused`.
    """
    base = given(run, limit=limit)
    try:
        with room():
            step = run.train_step.compiled
    except OutOfMemory as error:
        return dataclasses.replace(base, peak=error.used, limit=error.limit or base.limit)
    return with_compiled(base, step, some_device(run).platform)


def with_compiled(base: Needs, step: jax.stages.Compiled, platform: str) -> Needs:
    """`base` with the compiler's numbers: padding, results and temporaries, the program."""
    sizes = step.memory_analysis()
    assert sizes is not None  # the backends of JAX that clipx runs on have one
    arguments = sizes.argument_size_in_bytes
    results = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    peak = sizes.peak_memory_in_bytes
    if platform != "tpu":  # other backends leave temporaries out of the reported peak
        peak = arguments + results + sizes.temp_size_in_bytes
    memory = base.memory | {
        "padding": max(arguments - sum(base.memory.values()), 0),
        "results and temporaries": max(peak - arguments, 0),
        "program": sizes.generated_code_size_in_bytes,
    }
    return dataclasses.replace(base, memory=memory, peak=peak)


def memory_limit(device: Device) -> int | None:
    """Bytes that a program may use on a device; None if that is not known.

    The device's own number, else that of the table of chips. For a CPU device, its share of the
    machine's memory.
    """
    if device.platform == "cpu":
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return pages // jax.local_device_count()
    try:
        reported = (device.memory_stats() or {}).get("bytes_limit")
    except jax.errors.JaxRuntimeError:  # an absent device, to compile for
        reported = None
    chip = chips.chip(device.device_kind)
    return reported or (int(chip.memory * 2**30) if chip and chip.memory else None)


def gib(size: float | None) -> str:
    """`3.84 GiB`, or `?` for an unknown number of bytes."""
    return "?" if size is None else f"{size / 2**30:,.2f} GiB"


def describe_memory(needs: Needs) -> str:
    """`3.84 GiB of 15.75 GiB a device (parameters 0.56, ...)`."""
    kinds = [
        f"{name} {size / 2**30:.2f}" for name, size in needs.memory.items() if size >= 5 * 2**20
    ]
    limit = f" of {gib(needs.limit)}" if needs.limit else ""
    by_kind = f" ({', '.join(kinds)})" if kinds else ""
    return f"{gib(needs.need if needs.need is not None else needs.peak)}{limit} a device{by_kind}"


def describe(needs: Needs) -> str:
    """One line about the step, which a run prints before its first step."""
    work = scaled(needs.flops or needs.step_flops or 0, "FLOP")
    return f"a step: {work}, {describe_memory(needs)}, {needs.microbatches} micro-batch(es)"


def scaled(number: float, unit: str) -> str:
    """`4.04 PFLOP`: a number with the metric prefix of its unit, and the unit."""
    for prefix, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {prefix}{unit}"
    return f"{number:.3g} {unit}"


def logged(needs: Needs | None) -> dict[str, float]:
    """The predictions that metrics.jsonl shows beside the measurements of a step."""
    if needs is None or needs.need is None:
        return {}
    return {"predicted/memory_gib": needs.need / 2**30}


def measured(device: Device, needs: Needs, step_seconds: float) -> dict[str, float]:
    """The measurements of a step: `mfu`, if the device's peak is known, and `memory_gib`, the most
    memory in use so far, if the device reports it; and `flops_per_pair`, which are counted."""
    metrics = {} if needs.pair_flops is None else {"flops_per_pair": needs.pair_flops}
    if (mfu := needs.mfu(step_seconds)) is not None:
        metrics["mfu"] = mfu
    if peak := (device.memory_stats() or {}).get("peak_bytes_in_use"):
        metrics["memory_gib"] = peak / 2**30
    return metrics


def counts(run: Run) -> list[int]:
    """The numbers of micro-batches that divide the batch, ascending."""
    rows = run.batch_size // math.prod(run.mesh.shape[a] for a in ("data", "fsdp"))
    return [n for n in range(1, rows + 1) if rows % n == 0]


def fewest(
    run: R,
    fits: Callable[[Needs], bool],
    tell: Callable[[Needs], None] = lambda _: None,
    estimate: Callable[[R], Needs] | None = None,
) -> tuple[R, Needs] | None:
    """(the run with the fewest micro-batches that fit, its needs); None if no number fits.

    fits: decides about a number's needs. tell: called with the needs of every number tried.
    estimate: returns a run's needs; by default `measure`, which compiles its step.

    Temporaries scale as 1/n: start from that estimate, then try the divisors one by one, until one
    fits and the next smaller one does not.
    """
    numbers, tried = counts(run), {}

    def trial(index: int) -> bool:
        if index not in tried:
            candidate = run.with_microbatches(numbers[index])
            tried[index] = candidate, (estimate or measure)(candidate)
            tell(tried[index][1])
        return fits(tried[index][1])

    if trial(0):
        return tried[0]
    first = tried[0][1]
    index = min(1, len(numbers) - 1)
    if first.peak and first.limit:
        fixed = sum(held(run).values())
        wanted = (first.peak - fixed) / max(first.limit - fixed, 1)
        index = next((i for i, n in enumerate(numbers) if i and n >= wanted), len(numbers) - 1)
    if len(numbers) == 1:
        return None
    if trial(index):
        while index > 1 and trial(index - 1):
            index -= 1
        return tried[index]
    while index + 1 < len(numbers):
        index += 1
        if trial(index):
            return tried[index]
    return None


def fitted(
    run: R,
    *,
    agreed: Callable[[bool], bool] = bool,
    tell: Callable[[Needs], None] = lambda _: None,
) -> R:
    """The run, with a number in place of `train.microbatches=auto`.

    The number is the smallest for which the compiled step, two waiting batches and a margin of 5 %
    fit the devices' memory; 1 if that memory is not known. agreed: turns this process's answer into
    one that all processes share. tell: called with the needs of every number tried.

    Raises `ConfigError` if no number fits. With BatchNorm towers only 1 is tried: their statistics
    are per micro-batch, so another number would change the run.
    """
    if run.config.train.microbatches != "auto":
        return run
    waiting = _WAITING * bytes_held(run.batch)

    def fits(needs: Needs) -> bool:
        if needs.peak is None or needs.need is None or needs.fits is False:
            return agreed(False)
        return agreed(needs.limit is None or needs.need + waiting <= _MARGIN * needs.limit)

    where, exact = "config.train.microbatches", not {"image", "text"} & set(run.state.batch_stats)
    if not exact:
        one = run.with_microbatches(1)
        if fits(measure(one)):
            return one
        raise ConfigError(
            where,
            "'auto', towers with BatchNorm, and a batch that does not fit as one micro-batch",
            "a number: BatchNorm's statistics are per micro-batch, so the number changes the run",
            f"{where}=2, or a smaller config.train.batch_size",
        )
    result = fewest(run, fits, tell)
    if result is None:
        raise ConfigError(
            where,
            f"'auto', and the step does not fit even with {counts(run)[-1]} micro-batches; "
            f"with 1 it needs {describe_memory(measure(run))}",
            "a state and a batch that fit the devices' memory",
            "shard the state with config.mesh.fsdp, recompute more with config.image.remat and "
            "config.text.remat, or use a smaller config.train.batch_size",
        )
    return result[0]


def mesh_known(run: Run) -> dict[str, Any]:
    """The mesh and device that a run's `train.microbatches=auto` was resolved for, as JSON for the
    checkpoint."""
    return {"axes": dict(run.mesh.shape), "device": run.mesh.devices.flat[0].device_kind}
