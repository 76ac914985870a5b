"""How many micro-batches a step is cut into, where that is left to what fits."""

from __future__ import annotations

import math
from collections.abc import Callable

from clipx import predict
from clipx.errors import ConfigError
from clipx.parallel.mesh import bytes_held
from clipx.predict import Prediction, describe_memory, held
from clipx.run import Run

_WAITING = 2  # batches on the devices beside the step's own
_MARGIN = 0.95  # of a device's memory: evals and fragments have the rest


def counts(run: Run) -> list[int]:
    """The numbers of micro-batches that the batch divides into, ascending."""
    rows = run.batch_size // math.prod(run.mesh.shape[a] for a in ("data", "fsdp"))
    return [n for n in range(1, rows + 1) if rows % n == 0]


def fewest(
    run: Run,
    fits: Callable[[Prediction], bool],
    tell: Callable[[Prediction], None] = lambda _: None,
    estimate: Callable[[Run], Prediction] | None = None,
) -> tuple[Run, Prediction] | None:
    """The run with the fewest micro-batches that fit, its step compiled, and what is predicted of
    it; None where no number does. Every prediction made on the way is told.

    A step's temporaries are about inversely as many, which says where to look; from there it goes
    on number by number until one that fits has one below that does not.
    """
    numbers, tried = counts(run), {}

    def trial(place: int) -> bool:
        if place not in tried:
            other = run.with_microbatches(numbers[place])
            tried[place] = other, (estimate or predict.predict)(other)
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
    tell: Callable[[Prediction], None] = lambda _: None,
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

    def fits(found: Prediction) -> bool:
        if found.peak is None or found.fits is False:
            return agreed(False)
        return agreed(found.limit is None or found.need + waiting <= _MARGIN * found.limit)

    where, exact = "config.train.microbatches", not {"image", "text"} & set(run.state.batch_stats)
    if not exact:
        one = run.with_microbatches(1)
        if fits(predict.predict(one)):
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
            f"'auto', and not even {counts(run)[-1]} fit: {describe_memory(predict.predict(run))}",
            "a state and a batch that fit",
            "config.mesh.fsdp spreads the state, image.remat and text.remat recompute more",
        )
    return found[0]
