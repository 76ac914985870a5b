"""A run on hardware that is not here: what its step needs and takes, as a report and a table."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any

import jax

from clipx.errors import RunError
from clipx.parallel.chips import Topology
from clipx.planning import estimate, gpu_model
from clipx.planning.estimate import Prediction
from clipx.training import fit
from clipx.training.fit import gib, scaled
from clipx.training.run import Run, assemble

COMPILED = "compiled ahead of time, not run"
MODELLED = "analytic model, not compiled, not run"


def plan(config: dict[str, Any], where: Topology) -> tuple[Run, Prediction]:
    """The run of a config on a topology, and what is predicted of its step. A config that leaves
    the micro-batches to what fits gets the fewest that do; as many as there can be if none do."""
    devices = jax.devices("cpu")[: where.size] if where.gpu else where.devices()
    run = assemble(config, devices)
    if run.config.train.microbatches == "auto":
        found = fit.fewest(run, fits, tell_trial, _estimator(where))
        if found is not None:
            return found
        run = run.with_microbatches(fit.counts(run)[-1])
    try:
        return run, _estimator(where)(run)
    except jax.errors.JaxRuntimeError as error:
        raise RunError(f"{where.name}: the compiler fails: {error}") from None


def _estimator(where: Topology) -> Callable[[Run], Prediction]:
    if where.gpu:
        return functools.partial(gpu_model.predict, where=where)
    return functools.partial(estimate.predict, ahead=True)


def fits(found: Prediction) -> bool:
    return found.fits is True


def tell_trial(found: Prediction) -> None:
    said = "fits" if found.fits else "does not fit"
    sizes = f"batch {found.batch:,}, {found.microbatches} micro-batch(es)"
    print(f"  tried {sizes}: {said}, {gib(found.need)}", file=sys.stderr, flush=True)


def search(config: dict[str, Any], where: Topology, run: Run, found: Prediction) -> str:
    """The fewest micro-batches that fit, of a step that does not; of one that does, the largest
    batch, by doubling, that does too."""
    if not found.fits:
        fewest = fit.fewest(run, fits, tell_trial, _estimator(where))
        if fewest is None:
            return f"no number of micro-batches fits, {fit.counts(run)[-1]} neither"
        return f"fewest micro-batches that fit: {fewest[1].microbatches}, {gib(fewest[1].need)}"
    largest, slices = found, found.microbatches
    while True:
        sizes = {"batch_size": 2 * largest.batch, "microbatches": slices}
        _, larger = plan({**config, "train": {**config["train"], **sizes}}, where)
        tell_trial(larger)
        if not larger.fits:
            said = f"{largest.batch:,} at {slices} micro-batch(es), {gib(largest.need)}"
            return f"largest batch that fits, by doubling: {said}"
        largest = larger


def describe(name: str, where: Topology, run: Run, found: Prediction, price: float) -> list[str]:
    """The report of one plan, in lines."""
    how = MODELLED if found.analytic else COMPILED
    axes = ", ".join(f"{axis} {size}" for axis, size in run.mesh.shape.items() if size > 1)
    numbers = sum(x.size for x in jax.tree.leaves(run.state.params))
    title = f"{run.complete['objective']['name']}, {numbers:,} parameters"
    lines = [
        f"{how}: {name} on {where.name}, {found.devices} x {where.device_kind} ({axes or 'one'})",
        f"{title}, batch {found.batch:,}, {found.microbatches} micro-batch(es)",
        _verdict(found),
        *(f"  {kind:<24}{gib(size):>12}" for kind, size in found.memory.items() if size),
    ]
    if not found.refused:
        lines.append(f"  {'peak, program included':<24}{gib(found.need):>12}")
    lines += [f"  {note}" for note in found.notes]
    share = scaled(found.flops / found.devices, "FLOP")
    lines.append(
        f"a step: {scaled(found.flops, 'FLOP')} useful (3 x forward; recomputation not counted), "
        f"{share} a chip; {scaled(found.step_flops, 'FLOP')} as traced, recomputation included"
    )
    if found.bytes:
        lines.append(
            f"  {scaled(found.bytes, 'B')} moved a chip (the compiler's count, loops once)"
        )
    for kind, group, times, size in found.collectives or ():
        joined = "to another slice" if kind == "send" else f"of {group} chips"
        lines.append(f"  {kind} {joined}: {times:,} times, {size / 2**20:,.1f} MiB in all")
    if found.collectives == ():
        lines.append("  no collectives")
    if found.seconds:
        lines += _time(found)
        lines.append(_length(run, found, price))
    return lines


def _verdict(found: Prediction) -> str:
    sizes = f"{gib(found.need)} of {gib(found.limit)} a chip"
    if found.fits:
        return f"fits: {sizes}"
    return f"does not fit: {sizes}; --search finds the fewest micro-batches that do"


def _time(found: Prediction) -> list[str]:
    rate = f"{found.images_per_second:,.0f} images/s"
    mfu = f"MFU {found.predicted_mfu:.1%} of {found.chip.tflops:,.0f} TFLOP/s"
    lines = [f"time: {found.seconds:.3g} s a step, {rate}, {mfu}"]
    if not found.analytic:
        cycles = (
            f"{found.cycles / 1e6:,.1f} M estimated cycles at an assumed {found.chip.clock} GHz"
        )
        lines.append(
            f"  = the compiler's {cycles}, and {found.kernels:.3g} s that kernels are charged "
            "(FLOPs at half of peak or bytes); not validated, collectives not included"
        )
    if found.open_loops:
        lines.append(f"  {found.open_loops} loop(s) whose length the data tell count once")
    return lines


def hours(run: Run, found: Prediction) -> float | None:
    """Of all steps; None while the length is in epochs."""
    return run.steps * found.seconds / 3600 if run.steps and found.seconds else None


def _length(run: Run, found: Prediction, price: float) -> str:
    spent = hours(run, found)
    if spent is None:
        return "the run: its length is in epochs of data that is not open"
    chips = spent * found.devices
    cost = f", {chips * price:,.0f} at {price:g} a chip-hour" if price else ""
    return f"the run: {run.steps:,} steps, {spent:,.1f} h, {chips:,.0f} chip-hours{cost}"


@dataclasses.dataclass(frozen=True)
class Row:
    """A config on a topology."""

    name: str
    where: Topology
    run: Run
    found: Prediction
    price: float  # of a chip-hour; 0: none was given

    def cells(self) -> list[str]:
        found, spent = self.found, hours(self.run, self.found)
        how, verdict = " (model)" * found.analytic, "" if found.fits else ", does not fit"
        cells = [self.name, self.where.name + how, f"{found.batch:,}", str(found.microbatches)]
        need = gib(found.need).removesuffix(" GiB")
        cells.append(f"{need} of {gib(found.limit).removesuffix(' GiB')}{verdict}")
        if not found.seconds:
            return cells + [""] * 5
        cells += [
            f"{found.seconds:.3f}",
            f"{found.images_per_second:,.0f}",
            f"{found.predicted_mfu:.1%}",
        ]
        chips = None if spent is None else spent * found.devices
        cells.append("?" if chips is None else f"{chips:,.0f}")
        cells.append("" if chips is None or not self.price else f"{chips * self.price:,.0f}")
        return cells


def table(rows: list[Row]) -> list[str]:
    """Plans as a table in Markdown."""
    head = ["config", "topology", "batch", "micro-batches", "GiB a chip", "s a step", "images/s"]
    head += ["MFU", "chip-hours", "cost"]
    lines = [head, ["---"] * len(head), *(row.cells() for row in rows)]
    width = len(head) if any(row.price for row in rows) else len(head) - 1
    how = " / ".join(sorted({MODELLED if row.found.analytic else COMPILED for row in rows}))
    return [how, "", *("| " + " | ".join(cells[:width]) + " |" for cells in lines)]
