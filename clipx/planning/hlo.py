"""Reads the cost of a compiled program from its text (`compiled.as_text()`).

The TPU compiler annotates the operations that it schedules with `estimated_cycles`. This module
multiplies loops out and counts only the most expensive branch of a conditional. A Pallas kernel has
no such estimate. It is charged what its author declares: its FLOPs at half of the chip's peak or
its bytes at full bandwidth, whichever takes longer, and at least the bytes of its operands and
results. Collectives are listed but not timed.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

from clipx.errors import HloError
from clipx.planning.hlo_loops import count_trips
from clipx.planning.hlo_text import Computation, Instruction, parse, size

_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_ESTIMATE = re.compile(r'"cost_estimate":\{([^}]*)\}')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_SOURCE = re.compile(r'op_name="([^"]*)"')
_CHAIN = re.compile(r'chain_id="([^"]*)"')
KERNEL = "tpu_custom_call"  # what Pallas and Mosaic compile to
_FIRST = 'custom_call_target="AsyncCollectiveStart"'
_SPARSE = 'async_execution_thread="sparsecore"'
_PRODUCTS = ("convolution", "dot")
_FREE = ("AllocateBuffer", "ConcatBitcast", "Sharding")  # calls that move no data
COLLECTIVES = (
    *("all-gather", "all-reduce", "all-to-all", "collective-broadcast", "collective-permute"),
    *("ragged-all-to-all", "reduce-scatter", "send"),  # a send goes to another slice
)


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation with a cost. `cycles`, `flops` and `bytes` are those of one execution."""

    name: str
    kind: str  # opcode (a collective's without -start), "kernel" (Pallas) or "sparsecore"
    source: str  # path in the traced function, from metadata
    times: int  # executions in one run of the program
    cycles: int = 0  # the compiler's estimate
    flops: int = 0  # of a kernel
    bytes: int = 0  # of a kernel or collective
    group: int = 1  # number of devices that a collective joins
    chain: str = ""  # id of a chain of fusions, each of which holds a copy of one collective
    begins: bool = False  # whether the chain starts here and overlaps with other work
    product: bool = False  # whether it is a matrix product or a convolution, or holds one

    def seconds(self, *, peak: float, bandwidth: float, clock: float) -> float:
        """Seconds of all executions on a chip of `peak` FLOP/s, `bandwidth` B/s and `clock` Hz."""
        charged = self.kind in ("kernel", "custom-call")
        extra = charge(self, peak=peak, bandwidth=bandwidth) if charged else 0.0
        return (self.cycles / clock + extra) * self.times


@dataclasses.dataclass(frozen=True)
class Program:
    """The operations of a compiled program, and what they cost together."""

    operations: tuple[Operation, ...]
    open_loops: tuple[str, ...]  # names of loops whose length depends on the data: they count once

    @property
    def kernels(self) -> tuple[Operation, ...]:
        return tuple(o for o in self.operations if o.kind == "kernel")

    @property
    def collectives(self) -> tuple[Operation, ...]:
        return tuple(o for o in self.operations if o.kind in COLLECTIVES)

    @property
    def beside(self) -> tuple[Operation, ...]:
        """Operations that SparseCores execute in parallel. No estimate covers them."""
        return tuple(o for o in self.operations if o.kind == "sparsecore")

    @property
    def compiler_cycles(self) -> int:
        """The sum of the compiler's estimates, in cycles."""
        return sum(o.cycles * o.times for o in self.operations)

    def charged_seconds(self, *, peak: float, bandwidth: float) -> float:
        """Seconds charged for kernels and custom calls, which `compiler_cycles` leaves out. peak:
        the chip's FLOP/s. bandwidth: its bytes per second."""
        return self.seconds(peak=peak, bandwidth=bandwidth, clock=math.inf)

    def seconds(self, *, peak: float, bandwidth: float, clock: float) -> float:
        """Seconds of one run of the program on a chip of `peak` FLOP/s, `bandwidth` B/s and `clock`
        Hz; collectives excluded."""
        rates = {"peak": peak, "bandwidth": bandwidth, "clock": clock}
        return sum(o.seconds(**rates) for o in self.operations)

    def traffic(self) -> dict[tuple[str, int], tuple[int, int]]:
        """(kind, group) -> (executions, bytes) of the program's collectives. A collective's bytes
        are those of its complete array: the result of an all-gather or all-reduce, the operand of a
        reduce-scatter."""
        totals: dict[tuple[str, int], tuple[int, int]] = {}
        for o in self.collectives:
            times, size = totals.get((o.kind, o.group), (0, 0))
            totals[o.kind, o.group] = times + o.times, size + o.bytes * o.times
        return dict(sorted(totals.items()))


def charge(kernel: Operation, *, peak: float, bandwidth: float) -> float:
    """Seconds charged for one execution of a kernel."""
    return max(kernel.flops / (peak / 2), kernel.bytes / bandwidth)


def read(text: str) -> Program:
    """The costs in a compiled program's text. Raises `HloError` for a text that is no program, and
    for a kernel that declares no FLOPs."""
    computations, entry = parse(text)
    open_loops: dict[str, None] = {}
    operations = list(_walk(computations, entry, 1, open_loops))
    # a chain may begin before a loop and continue in its body: count it once, where it begins
    begun = {(o.kind, o.chain) for o in operations if o.begins}
    kept = (o for o in operations if o.begins or (o.kind, o.chain) not in begun)
    return Program(tuple(kept), tuple(open_loops))


def _walk(
    computations: dict[str, Computation], name: str, times: int, open_loops: dict[str, None]
) -> Iterator[Operation]:
    """Yields every operation of a computation and of the computations that it calls, each executed
    `times` times. Adds the names of loops of unknown length to `open_loops`."""
    computation, chains = computations[name], set()
    for i in computation.values():
        called, kind = i.called(), i.opcode.removesuffix("-start")
        source = (_SOURCE.search(i.rest) or ["", ""])[1]
        cycles = int((_CYCLES.search(i.rest) or [0, 0])[1])
        if i.opcode == "while":
            trips = count_trips(computations, computation, i)
            if trips is None:
                open_loops[i.name] = None
            yield from _walk(computations, called["body"], times * (trips or 1), open_loops)
        elif i.opcode == "conditional":  # only the most expensive branch counts
            branches = [list(_walk(computations, b, times, open_loops)) for b in i.branches()]
            yield from max(branches, key=_weight, default=())
        elif kind in COLLECTIVES:
            joined_bytes, group = _joined(computation, i)
            chain = (_CHAIN.search(i.rest) or ["", ""])[1]
            yield Operation(i.name, kind, source, times, cycles, 0, joined_bytes, group, chain)
        elif i.opcode == "custom-call":
            yield _custom_call(computation, i, source, times, cycles)
        elif i.opcode == "fusion":
            inside = list(_walk(computations, called["calls"], times, open_loops))
            fused_cycles = cycles or sum(o.cycles for o in inside)
            if fused_cycles:
                product = any(o.product for o in inside)
                yield Operation(i.name, kind, source, times, fused_cycles, product=product)
            first = any(_FIRST in x.rest for x in computations[called["calls"]].values())
            for o in inside:  # the fusion's estimate covers all but collectives and kernels
                if o.kind in COLLECTIVES or o.kind == "kernel":
                    if (o.kind, o.chain) in chains:
                        continue
                    chains |= {(o.kind, o.chain)} if o.chain else set()
                    scatter = called["calls"].startswith("all-reduce-scatter")
                    kind = "reduce-scatter" if scatter and o.kind == "all-reduce" else o.kind
                    begins = bool(o.chain) and (first or o.begins)
                    yield dataclasses.replace(o, kind=kind, cycles=0, begins=begins)
        else:
            if cycles or i.opcode in _PRODUCTS:
                product = i.opcode in _PRODUCTS
                yield Operation(i.name, kind, source, times, cycles, product=product)
            if i.opcode in ("call", "async-start"):
                inside = called.get("calls") or called["to_apply"]
                operations = _walk(computations, inside, times, open_loops)
                if _SPARSE in i.rest:
                    yield Operation(i.name, "sparsecore", source, times)
                    operations = (o for o in operations if o.kind in COLLECTIVES)
                yield from operations


def _weight(operations: list[Operation]) -> tuple[int, int]:
    return sum(o.cycles * o.times for o in operations), sum(o.bytes for o in operations)


def _joined(computation: Computation, i: Instruction) -> tuple[int, int]:
    """(bytes of the array that a collective joins, number of devices that it joins)."""
    given = sum(size(computation[name].type) for name in i.operands)
    made = size(i.type)
    if i.opcode.startswith("all-gather"):
        given = made - given if i.opcode.endswith("-start") else made
    return given, _group(i.rest)


def _group(rest: str) -> int:
    """Devices per replica group, written as `{{0,1},{2,3}}`, `[2,4]<=[8]` or `mesh['a'=2,'b'=4]
    {'b'}`."""
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return len(listed[1].split(","))
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", rest):
        return int(iota[2])
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] *\{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[name]) for name in re.findall(r"'([^']+)'", mesh[2]))
    return 2 if "source_target_pairs" in rest else 1


def _custom_call(
    computation: Computation, i: Instruction, source: str, times: int, cycles: int
) -> Operation:
    """A kernel, with the FLOPs that its author declares and the larger of declared bytes and the
    bytes of its operands and results; or a call by the compiler itself, with its estimated cycles
    or else those bytes."""
    target = (_TARGET.search(i.rest) or ["", "?"])[1]
    moved = size(i.type) + sum(size(computation[name].type) for name in i.operands)
    if target != KERNEL:
        moved = 0 if cycles or target in _FREE else moved
        return Operation(i.name, "custom-call", source, times, cycles, bytes=moved)
    estimate = _ESTIMATE.search(i.rest)
    declared = dict(re.findall(r'"(\w+)":"(\d+)"', estimate[1])) if estimate else {}
    flops = int(declared.get("flops", 0)) + int(declared.get("transcendentals", 0))
    if not flops:
        raise HloError(
            f"the kernel %{i.name} ({source}) declares no FLOPs, so its work would count as "
            "nothing; give its pallas_call a cost_estimate"
        )
    moved = max(moved, int(declared.get("bytes_accessed", 0)))
    return Operation(i.name, "kernel", source, times, flops=flops, bytes=moved)
