"""Plans a run on hardware that this machine does not have: the predicted memory and time of its
step, as a report and a table."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any

import jax

from clipx.data.threads import shown
from clipx.errors import RunError
from clipx.parallel.chips import Topology
from clipx.planning import estimate, gpu_model
from clipx.planning.estimate import Prediction
from clipx.planning.shares import Share
from clipx.training import fit
from clipx.training.fit import Needs, gib, scaled
from clipx.training.run import Run, assemble

COMPILED = "compiled ahead of time, not run"
_LEAST = 0.01  # share of a layer that has a line of its own
MODELLED = "analytic model, not compiled, not run"


def plan(config: dict[str, Any], where: Topology) -> tuple[Run, Prediction]:
    """Returns (the config's run on a topology, the prediction of its step).

    `train.microbatches=auto` becomes the fewest micro-batches that fit; if none fit, the most that
    the batch divides into. Raises `RunError` if the compiler fails.
    """
    devices = jax.devices("cpu")[: where.size] if where.gpu else where.devices()
    run = assemble(config, devices)
    if run.config.train.microbatches == "auto":
        fewest = fit.fewest(run, fits, tell_trial, _estimator(where))
        if fewest is not None:
            run, needs = fewest
            assert isinstance(needs, Prediction)  # `_estimator` returns nothing else
            return run, needs
        run = run.with_microbatches(fit.counts(run)[-1])
    try:
        with shown(f"planning on {where.name}"):
            return run, _estimator(where)(run)
    except jax.errors.JaxRuntimeError as error:
        raise RunError(f"{where.name}: the compiler fails: {error}") from None


def _estimator(where: Topology) -> Callable[[Run], Prediction]:
    if where.gpu:
        return functools.partial(gpu_model.predict, where=where)
    return functools.partial(estimate.predict, ahead=True)


def fits(prediction: Needs) -> bool:
    """Whether the step is known to fit."""
    return prediction.fits is True


def tell_trial(prediction: Needs, how: str = "") -> None:
    """Prints to stderr whether a tried number of micro-batches fits. how: what else was tried."""
    verdict = "fits" if prediction.fits else "does not fit"
    sizes = f"batch {prediction.batch:,}, {prediction.microbatches} micro-batch(es){how}"
    print(f"  tried {sizes}: {verdict}, {gib(prediction.need)}", file=sys.stderr, flush=True)


def search(
    config: dict[str, Any], where: Topology, run: Run, prediction: Prediction
) -> tuple[Run, Prediction, str]:
    """(run, prediction, one line). If the step does not fit: the run with the fastest recomputation
    with which it does, else with the fewest micro-batches. If it fits: the run as given, and in the
    line the largest batch, found by doubling, that fits too."""
    if not prediction.fits:
        if recomputed := _recompute(config, where, run, prediction):
            return recomputed
        fewest = fit.fewest(run, fits, tell_trial, _estimator(where))
        if fewest is None:
            most = fit.counts(run)[-1]
            line = f"no number of micro-batches fits, not even the largest possible, {most}"
            return run, prediction, line
        needs, before = fewest[1], prediction.microbatches
        assert isinstance(needs, Prediction)  # `_estimator` returns nothing else
        count = needs.microbatches
        line = f"fewest micro-batches that fit: {count}, {gib(needs.need)} (with the config's "
        line += f"{before} it does not: {gib(prediction.need)}); config.train.microbatches={count}"
        return fewest[0], needs, line
    largest, slices = prediction, prediction.microbatches
    while True:
        sizes = {"batch_size": 2 * largest.batch, "microbatches": slices}
        _, larger = plan({**config, "train": {**config["train"], **sizes}}, where)
        tell_trial(larger)
        if not larger.fits:
            sizes = f"{largest.batch:,} at {slices} micro-batch(es), {gib(largest.need)}"
            return run, prediction, f"largest batch that fits, by doubling: {sizes}"
        largest = larger


def _recompute(
    config: dict[str, Any], where: Topology, run: Run, prediction: Prediction
) -> tuple[Run, Prediction, str] | None:
    """What `search` returns for a step that fits once both towers recompute activations; None if
    no `remat` makes it fit."""
    towers = [name for name in ("image", "text") if hasattr(getattr(run.objective, name), "remat")]
    found = []
    for kind in ("dots", "full") if towers else ():
        keys = [f"--config.{name}.remat={kind}" for name in towers]
        chosen = {name: {**config[name], "remat": kind} for name in towers}
        found.append((*plan({**config, **chosen}, where), " ".join(keys)))
        tell_trial(found[-1][1], f", remat={kind}")
    fitting = [trial for trial in found if trial[1].fits]
    if not fitting:
        return None
    run, needs, keys = min(fitting, key=lambda trial: trial[1].seconds or 0.0)
    line = f"fastest recomputation that fits: {gib(needs.need)} (with the config's it does not: "
    return run, needs, f"{line}{gib(prediction.need)}); {keys}"


def describe(
    name: str, where: Topology, run: Run, prediction: Prediction, price: float
) -> list[str]:
    """The report of one plan, in lines. name: the config's. price: of a chip-hour; 0: not given."""
    p = prediction
    how = MODELLED if p.analytic else COMPILED
    axes = ", ".join(f"{axis} {size}" for axis, size in run.mesh.shape.items() if size > 1)
    parameters = sum(x.size for x in jax.tree.leaves(run.state.params))
    title = f"{run.complete['objective']['name']}, {parameters:,} parameters"
    lines = [
        f"{how}: {name} on {where.name}, {p.devices} x {where.device_kind} ({axes or 'one'})",
        f"{title}, batch {p.batch:,}, {p.microbatches} micro-batch(es)",
        _verdict(p),
        *(f"  {kind:<24}{gib(size):>12}" for kind, size in p.memory.items() if size),
    ]
    if not p.refused:
        lines.append(f"  {'peak, program included':<24}{gib(p.need):>12}")
    lines += [f"  {note}" for note in p.notes]
    assert p.flops and p.step_flops  # every topology's chip is known
    share = scaled(p.flops / p.devices, "FLOP")
    lines.append(
        f"a step: {scaled(p.flops, 'FLOP')} useful (3 x forward; recomputation not counted), "
        f"{share} a chip; {scaled(p.step_flops, 'FLOP')} as traced, recomputation included"
    )
    if p.bytes:
        lines.append(
            f"  {scaled(p.bytes, 'B')} read and written by a chip (the compiler's count, a loop "
            "counts once)"
        )
    for kind, group, times, size in p.collectives or ():
        joined = "to another slice" if kind == "send" else f"of {group} chips"
        lines.append(f"  {kind} {joined}: {times:,} times, {size / 2**20:,.1f} MiB in all")
    if p.collectives == ():
        lines.append("  no collectives")
    if p.seconds:
        lines += _time(p)
        lines.append(_length(run, p, price))
    return lines


def _verdict(prediction: Prediction) -> str:
    sizes = f"{gib(prediction.need)} of {gib(prediction.limit)} a chip"
    if prediction.fits:
        return f"fits: {sizes}"
    return f"does not fit: {sizes}; --search finds what to recompute, or the fewest micro-batches"


def _time(prediction: Prediction) -> list[str]:
    chip, mfu = prediction.chip, prediction.predicted_mfu
    assert chip and mfu is not None and prediction.seconds
    rate = f"{prediction.images_per_second:,.0f} images/s"
    share = f"MFU {mfu:.1%} of {chip.tflops:,.0f} TFLOP/s"
    lines = [f"time: {prediction.seconds:.3g} s a step, {rate}, {share}"]
    if prediction.cycles is not None:
        cycles = f"{prediction.cycles / 1e6:,.1f} M estimated cycles at an assumed {chip.clock} GHz"
        lines.append(
            f"  = the compiler's {cycles}, and {prediction.kernels:.3g} s charged for kernels "
            "(the longer of FLOPs at half of peak and bytes at full bandwidth); not validated, "
            "collectives not included"
        )
    lines += _layers(prediction)
    if prediction.open_loops:
        lines.append(f"  {prediction.open_loops} loop(s) of unknown length count once")
    return lines


def _layers(prediction: Prediction) -> list[str]:
    """Where a compiled step's time goes: by kind of work, and by layer down to `_LEAST`."""
    if not (prediction.work and prediction.layers):
        return []
    works = ", ".join(f"{work} {share:.1%}" for work, share in prediction.work.items())
    lines = [f"  of it {works}", f"  {'layer':<40}{'forward':>9}{'backward':>10}"]
    shown = [share for share in prediction.layers if share.total >= _LEAST]
    few = prediction.layers[len(shown) :]
    rest = Share("all others", sum(s.forward for s in few), sum(s.backward for s in few))
    for share in [*shown, *([rest] if few else [])]:
        lines.append(f"  {share.layer:<40}{share.forward:>9.1%}{share.backward:>10.1%}")
    return lines


def hours(run: Run, prediction: Prediction) -> float | None:
    """Hours that all steps take; None for a length in epochs or without a predicted time."""
    return run.steps * prediction.seconds / 3600 if run.steps and prediction.seconds else None


def _length(run: Run, prediction: Prediction, price: float) -> str:
    spent = hours(run, prediction)
    if spent is None:
        return "the run: length unknown, since it is in epochs and the data is not open"
    chips = spent * prediction.devices
    cost = f", {chips * price:,.0f} at {price:g} a chip-hour" if price else ""
    return f"the run: {run.steps:,} steps, {spent:,.1f} h, {chips:,.0f} chip-hours{cost}"


@dataclasses.dataclass(frozen=True)
class Row:
    """The plan of a config on a topology: one row of `table`."""

    name: str
    where: Topology
    run: Run
    found: Prediction
    price: float  # of a chip-hour; 0: not given

    def cells(self) -> list[str]:
        """The cells of the row, under the headings of `table`."""
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
    """Plans as a Markdown table, below a line that says how they were made."""
    head = ["config", "topology", "batch", "micro-batches", "GiB a chip", "s a step", "images/s"]
    head += ["MFU", "chip-hours", "cost"]
    lines = [head, ["---"] * len(head), *(row.cells() for row in rows)]
    width = len(head) if any(row.price for row in rows) else len(head) - 1
    how = " / ".join(sorted({MODELLED if row.found.analytic else COMPILED for row in rows}))
    return [how, "", *("| " + " | ".join(cells[:width]) + " |" for cells in lines)]
