"""How often a loop of a compiled program runs."""

from __future__ import annotations

import re

from clipx.planning.hlo_text import Computation, Instruction

_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_INDEX = re.compile(r"\bindex=(\d+)")
_MOVES = ("copy", "copy-start", "copy-done", "bitcast", "convert")


def count_trips(
    computations: dict[str, Computation], computation: Computation, loop: Instruction
) -> int | None:
    """How often the while loop `loop` of `computation` runs; None where that depends on the data.

    The compiler may state it. Else the loop must count by one, from one constant to another.
    """
    if known := _TRIPS.search(loop.rest):
        return int(known[1])
    condition = computations[loop.called()["condition"]]
    body = computations[loop.called()["body"]]

    def carried(place: int) -> list[Instruction | None]:
        """Element `place` of the loop's state: [before the loop, after an iteration]."""
        given = computation[loop.operands[0]]
        return [_element(computation, given, place), _element(body, _root(body), place)]

    def constant(i: Instruction | None, where: Computation) -> int | None:
        """The value of a constant, or of an element of the state that no iteration changes."""
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
    """[i, n] of a condition i < n; None for any other condition."""
    root = _root(condition)
    inner = computations[root.called()["calls"]] if root.opcode == "fusion" else condition
    compares = [i for i in inner.values() if i.opcode == "compare"]
    if len(compares) != 1 or "direction=LT" not in compares[0].rest:
        return None
    given = {}
    if inner is not condition:  # a fusion of the comparison: map its parameters back
        given = dict(
            zip([i.name for i in inner.values() if i.opcode == "parameter"], root.operands)
        )
    return [condition[given[n]] if n in given else inner[n] for n in compares[0].operands]


def _place(computation: Computation, i: Instruction) -> int | None:
    """The index of `i` in the computation's parameter tuple; None if it is no element of it."""
    if i.opcode != "get-tuple-element" or computation[i.operands[0]].opcode != "parameter":
        return None
    return int(_INDEX.search(i.rest)[1])


def _root(computation: Computation) -> Instruction:
    return list(computation.values())[-1]


def _origin(computation: Computation, i: Instruction) -> Instruction:
    """The instruction whose value `i` copies or converts."""
    while i.opcode in _MOVES and i.operands and i.operands[0] in computation:
        i = computation[i.operands[0]]
    return i


def _element(computation: Computation, made: Instruction, place: int) -> Instruction | None:
    """Element `place` of the tuple `made`; None where no tuple instruction makes it."""
    made = _origin(computation, made)
    if made.opcode != "tuple":
        return None
    return _origin(computation, computation[made.operands[place]])
