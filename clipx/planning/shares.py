"""Where the predicted time of a compiled program goes: to which layers, in which pass, and to which
kind of work."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable

from clipx.planning.hlo import Operation

# Parts of a path in the traced function that name no module: `jit(_where)`, `CLIP.encode_image`,
# `id,jd->ij`, and what JAX calls its own loops and transformations.
_NO_MODULE = re.compile(
    r".*[^\w].*|while|body|cond|branch_\d+_fun|closed_call|checkpoint|rematted_computation"
    r"|shard_map|custom_[vj][jv]p\w*"
)
_METHOD = re.compile(r"\(\w+\.(loss|embed)\)")
UNNAMED = "unnamed"


@dataclasses.dataclass(frozen=True)
class Share:
    """The time of one layer, as fractions of the whole step."""

    layer: str  # path of modules, blocks taken together: `image/transformer/block/mlp`
    forward: float  # for what has no gradient, such as the update: all of it
    backward: float  # with what the backward pass computes again

    @property
    def total(self) -> float:
        return self.forward + self.backward


def place(source: str) -> tuple[str, bool]:
    """(layer, whether in the backward pass) of an operation, by its path in the traced step.

    Layers are named as parameters are, without the number of a block. What belongs to no module is
    "embed" or "loss", by the method of the objective that computes it, or else "update".
    """
    if "/" not in source:  # the compiler's own, such as `broadcast.562`
        return UNNAMED, False
    method = (_METHOD.search(source) or ["", "update"])[1]
    parts = [part for part in source.split("/")[:-1] if not _NO_MODULE.fullmatch(part)]
    parts = ["block" if re.fullmatch(r"blocks|block_\d+", part) else part for part in parts]
    depth = parts.index("block") + 2 if "block" in parts else 2
    parts = parts[:depth] if method != "loss" else ["loss", *parts[: depth - 1]]
    backward = "transpose(" in source or "rematted_computation" in source
    return "/".join(parts if method != "update" else []) or method, backward


def by_layer(operations: Iterable[Operation], seconds: Callable[[Operation], float]) -> list[Share]:
    """The layers' shares, the largest first. seconds: of all executions of an operation."""
    times: dict[str, list[float]] = {}
    for operation in operations:
        layer, backward = place(operation.source)
        times.setdefault(layer, [0.0, 0.0])[backward] += seconds(operation)
    whole = sum(map(sum, times.values())) or 1.0
    shares = (Share(layer, *(time / whole for time in both)) for layer, both in times.items())
    return sorted((share for share in shares if share.total), key=lambda share: -share.total)


def by_work(
    operations: Iterable[Operation], seconds: Callable[[Operation], float]
) -> dict[str, float]:
    """Fractions of the time: matrix products with what is fused into them, Pallas kernels, copies
    to another layout or memory, and all else."""
    times: dict[str, float] = dict.fromkeys(("products", "kernels", "copies", "other"), 0.0)
    for operation in operations:
        times[_work(operation)] += seconds(operation)
    whole = sum(times.values()) or 1.0
    return {work: time / whole for work, time in times.items()}


def _work(operation: Operation) -> str:
    if operation.kind == "kernel":
        return "kernels"
    if operation.product:
        return "products"
    return "copies" if operation.kind in ("copy", "transpose") else "other"
