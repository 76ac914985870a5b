"""Floating-point operations of a function, counted where it is traced: nothing is compiled."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn


class Product(NamedTuple):
    """A matrix product or convolution."""

    flops: int  # of one execution
    bytes: int  # of its operands and its result
    times: int  # executions


def products(jaxpr: ClosedJaxpr | Jaxpr, times: int = 1) -> Iterator[Product]:
    """Every matrix product and convolution of a jaxpr, those in loops as often as they run. A loop
    whose length is not known counts once; of a condition's branches the dearest counts."""
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, params = eqn.primitive.name, eqn.params
        if name in ("dot_general", "conv_general_dilated"):
            held = sum(_bytes(v.aval) for v in (*eqn.invars, *eqn.outvars))
            yield Product(_flops(eqn), held, times)
        elif name == "cond":
            branches = [list(products(branch, times)) for branch in params["branches"]]
            yield from max(branches, key=total)
        else:
            inside = times
            if name == "scan":
                inside *= params["length"]
            elif name == "shard_map":
                inside *= math.prod(params["mesh"].shape.values())
            elif name == "pallas_call":
                inside *= math.prod(params["grid_mapping"].grid)
            for value in params.values():
                for part in value if isinstance(value, (tuple, list)) else (value,):
                    if isinstance(part, (ClosedJaxpr, Jaxpr)):
                        yield from products(part, inside)


def total(found) -> int:
    """FLOPs of all of them."""
    return sum(p.flops * p.times for p in found)


def _bytes(aval) -> int:
    return math.prod(aval.shape) * np.dtype(aval.dtype).itemsize


def _flops(eqn: JaxprEqn) -> int:
    """A multiplication and an addition for each term of each sum."""
    left, right = (v.aval for v in eqn.invars[:2])
    made = math.prod(eqn.outvars[0].aval.shape)
    if eqn.primitive.name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        return 2 * made * math.prod(left.shape[i] for i in contracted)
    kernel = eqn.params["dimension_numbers"].rhs_spec  # (out, in, *space)
    return 2 * made * math.prod(right.shape[i] for i in kernel[1:])
