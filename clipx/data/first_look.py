"""A look at some rows of a data set before a run compiles.

A single bad row is met and replaced in training. What is wrong with the whole set is said here, of
the set: captions that are missing, pictures that are not there, labels in place of captions.
"""

from __future__ import annotations

import collections
import concurrent.futures
import math
import re
from collections.abc import Callable
from typing import Literal

from clipx.data.base import Source
from clipx.data.config import DataConfig
from clipx.data.order import spread
from clipx.data.storage import THREADS
from clipx.data.text import cleaning
from clipx.errors import BadSample, DataError

LOOKED_AT = 1000  # rows, spread over the set; their pictures are not decoded
_FEW_ALIKE = 20  # rows looked at if they are made
_FEW = 5  # bad rows that a small set may have
_SHOWN = 3  # reasons listed in an error
_VARIES = re.compile(r"\S*[/\\]\S*|'[^']*'|\d+")  # what differs between rows with the same fault
_CLASSES = (
    "; a run trains on captions, and a set of classes is to evaluate on (config.evals, with the "
    "evaluator zero_shot)"
)
_NEEDS = {
    "captions": "; for a set of classes use the evaluator zero_shot",
    "labels": "; for a set of captions use the evaluator retrieval",
}


def refuse_unusable(source: Source, config: DataConfig) -> None:
    """Raises `DataError` if so many of the rows looked at are bad that the run would stop.

    More than `config.max_bad_fraction` are too many, beyond what chance can do to a sample, and
    beyond a few rows of a small set.
    """

    def fault(row: int) -> BadSample | None:
        try:
            example = source.glance(row)
        except BadSample as error:
            return error
        if not example.texts:
            label = "" if example.label is None else "a label and "
            return BadSample(example.key, f"{label}no caption")
        if config.reject_cjk and all(map(cleaning.has_cjk, example.texts)):
            return BadSample(example.key, "Chinese characters in the caption (data.reject_cjk)")
        return None

    bad, count = _faults(source, fault, len(source))
    limit = config.max_bad_fraction
    chance = 0 if count == len(source) else 3 * math.sqrt(limit * count)
    allowed = max(limit * count + chance, min(_FEW, count / 2))
    if len(bad) <= allowed and (not bad or len(bad) < count):
        return
    classes = sum(error.reason.startswith("a label and") for error in bad) > len(bad) / 2
    account = source.account()
    left_out = "".join(f"; {line.strip()}" for line in account.lines()) if account else ""
    raise DataError(
        f"config.data: {len(bad):,} of {count:,} rows looked at cannot be used, more than "
        f"config.data.max_bad_fraction={limit}: {_listed(bad)}{_CLASSES * classes}{left_out}"
    )


def refuse_unfit(
    where: str, source: Source, needs: Literal["", "captions", "labels"], limit: int | None = None
) -> None:
    """Raises `DataError` if none of the rows of an evaluation set can be evaluated on.

    where: the path of its section. needs: what the evaluator reads beside pictures. limit: how many
    rows are evaluated.
    """

    def fault(row: int) -> BadSample | None:
        try:
            example = source.glance(row)
        except BadSample as error:
            return error
        missing = {"captions": not example.texts, "labels": example.label is None}
        return BadSample(example.key, f"no {needs}") if missing.get(needs) else None

    bad, count = _faults(source, fault, min(len(source), limit or len(source)))
    if bad and len(bad) == count:
        unfit = any(error.reason == f"no {needs}" for error in bad)
        raise DataError(
            f"config.{where}: none of {count:,} rows looked at can be evaluated on: "
            f"{_listed(bad)}{_NEEDS.get(needs, '') * unfit}"
        )


def _faults(
    source: Source, fault: Callable[[int], BadSample | None], rows: int
) -> tuple[list[BadSample], int]:
    """(what is wrong with rows among those looked at, how many are looked at)."""
    chosen = spread(rows, _FEW_ALIKE if source.alike else LOOKED_AT).tolist()
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        return [error for error in pool.map(fault, chosen) if error is not None], len(chosen)


def _listed(bad: list[BadSample]) -> str:
    """The most frequent reasons, each with its count and the key of a row."""
    groups = collections.defaultdict[str, list[BadSample]](list)
    for error in bad:
        groups[_VARIES.sub("", error.reason)].append(error)
    largest = sorted(groups.values(), key=lambda group: -len(group))
    listed = [f"{len(group):,}: {group[0].reason}, such as {group[0].key}" for group in largest]
    return "; ".join(listed[:_SHOWN]) + "; and other reasons" * (len(listed) > _SHOWN)
