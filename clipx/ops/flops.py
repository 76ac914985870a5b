"""Floating-point operations of a traced function; nothing is compiled."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn


class Product(NamedTuple):
    """A matrix product or convolution of a program."""

    flops: int  # of one execution
    bytes: int  # of the operands and the result
    times: int  # number of executions


def products(jaxpr: ClosedJaxpr | Jaxpr, times: int = 1) -> Iterator[Product]:
    """Every matrix product and convolution of a jaxpr.

    `times` counts the runs of the loops around it, and its devices inside a `shard_map`. A loop of
    unknown length counts once. Of the branches of a condition the one with the most FLOPs counts.
    """
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, params = eqn.primitive.name, eqn.params
        if name in ("dot_general", "conv_general_dilated"):
            size = sum(_bytes(v.aval) for v in (*eqn.invars, *eqn.outvars))
            yield Product(_flops(eqn), size, times)
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


def total(products: Iterable[Product]) -> int:
    """The FLOPs of all executions of all products."""
    return sum(p.flops * p.times for p in products)


def _shape(variable: Any) -> tuple[int, ...]:  # variables of a jaxpr have no public type
    return variable.aval.shape


def _bytes(aval: Any) -> int:
    return math.prod(aval.shape) * np.dtype(aval.dtype).itemsize


def _flops(eqn: JaxprEqn) -> int:
    """A multiplication and an addition for each term of each sum."""
    left, right = map(_shape, eqn.invars[:2])
    outputs = math.prod(_shape(eqn.outvars[0]))
    if eqn.primitive.name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        return 2 * outputs * math.prod(left[i] for i in contracted)
    kernel = eqn.params["dimension_numbers"].rhs_spec  # (out, in, *space)
    return 2 * outputs * math.prod(right[i] for i in kernel[1:])
