"""What the readers of image encoders share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence

from clipx.interop import rules
from clipx.interop.model import tower_shapes
from clipx.interop.rules import Arrays, Rule
from clipx.models.base import Tower
from clipx.types import PyTree


def reader(
    tower: Tower,
    layout: Sequence[Rule],
    arrays: Callable[[], Arrays],
    heads: Collection[str],
    where: str,
) -> Callable[[], tuple[PyTree, PyTree]]:
    """The `read` of an `Encoder`. heads: first parts of the names of layers above the features,
    which are left out."""

    def read() -> tuple[PyTree, PyTree]:
        own = {k: x for k, x in arrays().items() if k.partition(".")[0] not in heads}
        found = rules.read(layout, own, functools.partial(tower_shapes, "image", tower), where)
        return found["params"]["image"], found.get("batch_stats", {}).get("image", {})

    return read
