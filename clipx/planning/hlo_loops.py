"""Counts the iterations of the loops of a compiled program."""

from __future__ import annotations

import re

from clipx.errors import HloError
from clipx.planning.hlo_text import Computation, Instruction

_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_INDEX = re.compile(r"\bindex=(\d+)")
_MOVES = ("copy", "copy-start", "copy-done", "bitcast", "convert")


def count_trips(
    computations: dict[str, Computation], computation: Computation, loop: Instruction
) -> int | None:
    """Number of iterations of the while loop `loop` of `computation`; None if it depends on data.

    The compiler may state the number. Otherwise the loop must count up by 1 between two constants.
    """
    if known := _TRIPS.search(loop.rest):
        return int(known[1])
    condition = computations[loop.called()["condition"]]
    body = computations[loop.called()["body"]]

    def carried(place: int) -> tuple[Instruction | None, Instruction | None]:
        """Element `place` of the loop's state: (before the loop, after an iteration)."""
        initial = computation[loop.operands[0]]
        return _element(computation, initial, place), _element(body, _root(body), place)

    def constant(i: Instruction | None, where: Computation) -> int | None:
        """The value of `i` if it is a constant, or an element of the loop's state that starts as a
        constant and that no iteration changes; otherwise None."""
        if i is None:
            return None
        i = _origin(where, i)
        if i.opcode == "constant" and i.arguments.isdigit():
            return int(i.arguments)
        place = None if where is computation else _place(where, i)
        if place is None:
            return None
        first, after = carried(place)
        return constant(first, computation) if after and _place(body, after) == place else None

    compared = _comparison(computations, condition)
    if compared is None:
        return None
    counter, bound = (_origin(condition, i) for i in compared)
    place, stop = _place(condition, counter), constant(bound, condition)
    if place is None or stop is None:
        return None
    first, after = carried(place)
    start = constant(first, computation)
    if start is None or after is None or after.opcode != "add":
        return None
    steps = [constant(body[n], body) for n in after.operands]
    return max(stop - start, 0) if 1 in steps else None


def _comparison(
    computations: dict[str, Computation], condition: Computation
) -> list[Instruction] | None:
    """The operands [i, n] of a condition i < n; None for any other condition."""
    root = _root(condition)
    inner = computations[root.called()["calls"]] if root.opcode == "fusion" else condition
    compares = [i for i in inner.values() if i.opcode == "compare"]
    if len(compares) != 1 or "direction=LT" not in compares[0].rest:
        return None
    arguments = {}
    if inner is not condition:  # the comparison is fused: map its parameters to their arguments
        arguments = dict(
            zip([i.name for i in inner.values() if i.opcode == "parameter"], root.operands)
        )
    return [condition[arguments[n]] if n in arguments else inner[n] for n in compares[0].operands]


def _place(computation: Computation, i: Instruction) -> int | None:
    """The index of `i` in the computation's parameter tuple; None if it is not an element."""
    if i.opcode != "get-tuple-element" or computation[i.operands[0]].opcode != "parameter":
        return None
    index = _INDEX.search(i.rest)
    if index is None:
        raise HloError(f"%{i.name} takes an element of a tuple and states no index")
    return int(index[1])


def _root(computation: Computation) -> Instruction:
    return list(computation.values())[-1]


def _origin(computation: Computation, i: Instruction) -> Instruction:
    """The instruction whose value `i` holds, copies and conversions undone."""
    while i.opcode in _MOVES and i.operands and i.operands[0] in computation:
        i = computation[i.operands[0]]
    return i


def _element(computation: Computation, made: Instruction, place: int) -> Instruction | None:
    """Element `place` of the tuple `made`; None if `made` is not built by a tuple instruction."""
    made = _origin(computation, made)
    if made.opcode != "tuple":
        return None
    return _origin(computation, computation[made.operands[place]])
