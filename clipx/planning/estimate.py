"""What a training step needs and takes, from its compiled program: before it runs, or instead."""

from __future__ import annotations

import dataclasses
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import jax

from clipx.errors import OutOfMemory
from clipx.parallel import chips
from clipx.planning import hlo
from clipx.training.fit import Needs, describe, given, room, some_device, with_compiled
from clipx.training.run import Run


@dataclasses.dataclass(frozen=True)
class Prediction(Needs):
    """What is known of a step on one mesh, its time included. None: not known."""

    bytes: float | None = None  # that one device reads and writes, as the compiler counts them
    cycles: int | None = None  # the compiler's estimates of one device, loops multiplied out
    kernels: float | None = None  # seconds that kernels are charged beside them
    seconds: float | None = None  # without collectives
    collectives: tuple[tuple[str, int, int, int], ...] | None = None  # kind, group, times, bytes
    open_loops: int = 0  # that count once, for their length is not known
    analytic: bool = False  # no compiler was asked
    notes: tuple[str, ...] = ()

    @property
    def refused(self) -> bool:
        """Whether the compiler found no room for it."""
        return super().refused and not self.analytic

    @property
    def images_per_second(self) -> float | None:
        return self.batch / self.seconds if self.seconds else None

    @property
    def predicted_mfu(self) -> float | None:
        """Useful FLOPs over what the devices could do in the predicted time."""
        return self.mfu(self.seconds) if self.seconds else None

    def as_dict(self) -> dict[str, Any]:
        derived = {name: getattr(self, name) for name in ("fits", "need", "images_per_second")}
        return dataclasses.asdict(self) | derived | {"mfu": self.predicted_mfu}


def compile_ahead(step: jax.stages.Lowered) -> tuple[jax.stages.Compiled, Callable[[], str]]:
    """A function compiled for TPUs that are not here, and what gives its program's text, which the
    compiler wrote to a file meanwhile: libtpu 0.0.52 cannot print (`as_text`) a program that has a
    SparseCore gather, as steps for v5p and v6e do."""
    with room(), tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        made = step.compile(compiler_options=options)
        texts = [path.read_text() for path in pathlib.Path(folder).glob("*.after_codegen.txt")]
    return made, (lambda: texts[0]) if len(texts) == 1 else made.as_text


def predict(run: Run, *, limit: int | None = None, ahead: bool = False) -> Prediction:
    """What the run's step needs and takes; compiles it if it is not compiled yet. `ahead`: it is
    compiled for devices that are not here, to be looked at and not kept. Does not raise where the
    compiler finds no room: such a prediction does not fit."""
    base = Prediction(**vars(given(run, limit=limit)))
    device, chip = some_device(run), base.chip
    try:
        if ahead:
            step, text = compile_ahead(run.lower())
        else:
            with room():
                step, text = run.train_step, run.train_step.as_text
    except OutOfMemory as error:
        return dataclasses.replace(base, peak=error.used, limit=error.limit or base.limit)
    timed = device.platform == "tpu" and chip and chip.clock
    return dataclasses.replace(
        with_compiled(base, step, device.platform),
        bytes=_cost(step).get("bytes accessed"),
        **(time_of(text, chip) if timed else {}),
    )


def _cost(step: jax.stages.Compiled) -> dict[str, float]:
    cost = step.cost_analysis()
    return (cost[0] if isinstance(cost, list) else cost) or {}


def time_of(text: Callable[[], str], chip: chips.Chip) -> dict[str, Any]:
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


def short(found: Prediction) -> list[str]:
    """A step in a line, and what is predicted of its time in another."""
    lines = [describe(found)]
    if found.seconds:
        mfu = f", {found.predicted_mfu:.1%} MFU" if found.predicted_mfu else ""
        rate = f"{found.images_per_second:,.0f} images/s{mfu}"
        lines.append(
            f"predicted: {found.seconds:.3g} s a step, {rate} (the compiler's estimate at an "
            "assumed clock, without collectives; not validated)"
        )
    return [*lines, *found.notes]
