"""What the readers of image encoders share."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence

from clipx.interop import rules
from clipx.interop.model import tower_shapes
from clipx.interop.rules import Arrays, Rule
from clipx.models.base import Tower
from clipx.types import PyTree


def reader(
    tower: Tower,
    layout: Sequence[Rule],
    arrays: Callable[[], Arrays],
    left_out: re.Pattern[str],
    where: str,
) -> Callable[[], tuple[PyTree, PyTree]]:
    """The `read` of an `Encoder`. left_out: matches the beginning of the names of arrays that the
    features do not need, such as a classifier's."""

    def read() -> tuple[PyTree, PyTree]:
        own = {k: x for k, x in arrays().items() if not left_out.match(k)}
        found = rules.read(layout, own, functools.partial(tower_shapes, "image", tower), where)
        return found["params"]["image"], found.get("batch_stats", {}).get("image", {})

    return read
