"""Parses the text of a compiled program (HLO) into computations and instructions."""

from __future__ import annotations

import dataclasses
import math
import re

from clipx.errors import HloError

_HEADER = re.compile(r"^(ENTRY )?%?(\S+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?(\S+) = ")
_OPCODE = re.compile(r"\s*([\w-]+)\(")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_NAME = re.compile(r"%([\w.-]+)")
_BITS = re.compile(r"\d+")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition)=%?([\w.-]+)")
_BRANCHES = re.compile(r"\b(?:true_computation|false_computation)=%?([\w.-]+)")
_BRANCH_LIST = re.compile(r"\bbranch_computations=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation: `name = type opcode(arguments)rest`."""

    name: str
    type: str
    opcode: str
    arguments: str  # the text between the parentheses
    rest: str  # the attributes after them

    @property
    def operands(self) -> list[str]:
        return _NAME.findall(self.arguments)

    def called(self) -> dict[str, str]:
        """Attribute (`calls`, `to_apply`, `body` or `condition`) -> name of the computation."""
        return dict(_CALLED.findall(self.rest))

    def branches(self) -> list[str]:
        """Names of the computations that a conditional chooses from."""
        listed = _BRANCH_LIST.search(self.rest)
        return _NAME.findall(listed[1]) if listed else _BRANCHES.findall(self.rest)


Computation = dict[str, Instruction]  # name -> instruction, in program order


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Returns (name -> computation, name of the entry computation). Raises `HloError` for a text
    that is not a compiled program."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None:
            if header := _HEADER.match(line):
                current = computations.setdefault(header[2], {})
                entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif found := _INSTRUCTION.match(line):
            instruction = _instruction(found[2], line[found.end() :])
            current[instruction.name] = instruction
    if not entry:
        raise HloError("the text has no ENTRY computation: it is not a compiled program")
    return computations, entry


def _instruction(name: str, text: str) -> Instruction:
    end = _closing(text, 0) if text.startswith("(") else text.index(" ")
    opcode = _OPCODE.match(text, end)
    if not opcode:
        raise HloError(f"the line of %{name} has no operation")
    close = _closing(text, opcode.end() - 1)
    return Instruction(name, text[:end], opcode[1], text[opcode.end() : close - 1], text[close:])


def _closing(text: str, start: int) -> int:
    """The index after the parenthesis that closes the parenthesis at `start`."""
    depth = 0
    for parenthesis in re.finditer(r"[()]", text[start:]):
        depth += 1 if parenthesis[0] == "(" else -1
        if not depth:
            return start + parenthesis.end()
    raise HloError(f"a parenthesis is never closed: {text[start : start + 80]}")


def size(type_: str) -> int:
    """Bytes in memory of an array type or a tuple of types, padding of tiles included."""
    total = 0
    for dtype, dims, layout in _SHAPE.findall(type_):
        if dtype in ("token", "opaque"):
            continue
        shape = [int(d.lstrip("<=")) for d in dims.split(",") if d]
        order, _, tiling = layout.partition(":")
        minor = [int(d) for d in order.split(",") if d]
        tile = re.match(r"T\(([\d,]*)\)", tiling)
        sides = [int(d) for d in tile[1].split(",") if d] if tile else []
        for side, axis in zip(reversed(sides), minor, strict=False):
            shape[axis] = -(-shape[axis] // side) * side
        bits = 1 if dtype == "pred" else int((_BITS.search(dtype) or ["8"])[0])
        total += math.prod(shape) * max(bits, 8 if dtype == "pred" else 1) // 8
    return total
