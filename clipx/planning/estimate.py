"""Predicts the memory and time of a training step from its compiled program, without running it."""

from __future__ import annotations

import dataclasses
import operator
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import jax

from clipx.errors import OutOfMemory
from clipx.parallel import chips
from clipx.planning import hlo, shares
from clipx.planning.shares import Share
from clipx.training.fit import Needs, describe, given, room, some_device, with_compiled
from clipx.training.run import Run


@dataclasses.dataclass(frozen=True)
class Prediction(Needs):
    """The predicted memory and time of a step on one mesh. None: not known."""

    bytes: float | None = None  # that one device reads and writes, as the compiler counts them
    cycles: int | None = None  # the compiler's estimate for one device, loops multiplied out
    kernels: float | None = None  # seconds charged for kernels, which `cycles` leaves out
    seconds: float | None = None  # of one step, collectives excluded
    collectives: tuple[tuple[str, int, int, int], ...] | None = None  # kind, group, times, bytes
    open_loops: int = 0  # loops of unknown length, which count once
    work: dict[str, float] | None = None  # fractions of `seconds` by `shares.by_work`
    layers: tuple[Share, ...] = ()  # fractions of `seconds` by layer, the largest first
    analytic: bool = False  # estimated by arithmetic, without a compiler
    notes: tuple[str, ...] = ()

    @property
    def refused(self) -> bool:
        """Whether the compiler ran out of device memory."""
        return super().refused and not self.analytic

    @property
    def images_per_second(self) -> float | None:
        return self.batch / self.seconds if self.seconds else None

    @property
    def predicted_mfu(self) -> float | None:
        """Useful FLOPs, as a fraction of the devices' peak over the predicted time."""
        return self.mfu(self.seconds) if self.seconds else None

    def as_dict(self) -> dict[str, Any]:
        derived = {name: getattr(self, name) for name in ("fits", "need", "images_per_second")}
        return dataclasses.asdict(self) | derived | {"mfu": self.predicted_mfu}


def compile_ahead(step: jax.stages.Lowered) -> tuple[jax.stages.Compiled, Callable[[], str]]:
    """Compiles `step` for TPUs that this machine does not have. Returns (the compiled step, a
    function that returns its program's text).

    The text comes from a file that the compiler writes: `as_text` of libtpu 0.0.52 fails on
    programs with a SparseCore gather, which steps for v5p and v6e have. Raises `OutOfMemory`.
    """
    with room(), tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        made = step.compile(compiler_options=options)
        texts = [path.read_text() for path in pathlib.Path(folder).glob("*.after_codegen.txt")]
    return made, (lambda: texts[0]) if len(texts) == 1 else _text(made)


def _text(step: jax.stages.Compiled) -> Callable[[], str]:
    return lambda: step.as_text() or ""


def predict(run: Run, *, limit: int | None = None, ahead: bool = False) -> Prediction:
    """Predicts the memory and time of the run's step; compiles the step if necessary.

    limit: bytes of device memory, instead of the device's own. ahead: compile for devices that this
    machine does not have, and do not keep the result. If the compiler runs out of device memory,
    returns a prediction that does not fit.
    """
    base = Prediction(**vars(given(run, limit=limit)))
    device, chip = some_device(run), base.chip
    try:
        if ahead:
            step, text = compile_ahead(run.lower())
        else:
            with room():
                step = run.train_step.compiled
                text = _text(step)
    except OutOfMemory as error:
        return dataclasses.replace(base, peak=error.used, limit=error.limit or base.limit)
    compiled = with_compiled(base, step, device.platform)
    assert isinstance(compiled, Prediction)  # it returns what it was given, with more fields set
    timed = device.platform == "tpu" and chip and chip.clock
    time = time_of(text, chip) if chip and timed else {}
    return dataclasses.replace(compiled, bytes=_cost(step).get("bytes accessed"), **time)


def _cost(step: jax.stages.Compiled) -> dict[str, float]:
    cost = step.cost_analysis()
    return (cost[0] if isinstance(cost, list) else cost) or {}


def time_of(text: Callable[[], str], chip: chips.Chip) -> dict[str, Any]:
    """Fields of a `Prediction`, from the program's text: the compiler's time and the collectives.
    For a text that cannot be parsed, only a note that says so. `chip` must have a bandwidth and a
    clock."""
    assert chip.bandwidth and chip.clock
    rates = {"peak": chip.tflops * 1e12, "bandwidth": chip.bandwidth * 1e9}
    seconds = operator.methodcaller("seconds", **rates, clock=chip.clock * 1e9)
    try:
        program = hlo.read(text())
    except (LookupError, ValueError, jax.errors.JaxRuntimeError) as error:
        return {"notes": (f"no estimate of time: {type(error).__name__}: {error}",)}
    beside = f"{len(program.beside)} operation(s) that run on SparseCores are not timed"
    return {
        "cycles": program.compiler_cycles,
        "kernels": program.charged_seconds(**rates),
        "seconds": seconds(program),
        "work": shares.by_work(program.operations, seconds),
        "layers": tuple(shares.by_layer(program.operations, seconds)),
        "collectives": tuple((*key, *value) for key, value in program.traffic().items()),
        "open_loops": len(program.open_loops),
        "notes": (beside,) if program.beside else (),
    }


def short(prediction: Prediction) -> list[str]:
    """A few lines: the step's memory, its predicted time if known, and notes."""
    lines = [describe(prediction)]
    if prediction.seconds:
        mfu = f", {prediction.predicted_mfu:.1%} MFU" if prediction.predicted_mfu else ""
        rate = f"{prediction.images_per_second:,.0f} images/s{mfu}"
        lines.append(
            f"predicted: {prediction.seconds:.3g} s a step, {rate} (the compiler's estimate at an "
            "assumed clock, without collectives; not validated)"
        )
    return [*lines, *prediction.notes]
