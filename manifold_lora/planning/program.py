"""What a compiled program moves in a step: between devices and to and from memory."""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from manifold_lora.planning.hlo import (
    Computation,
    Instruction,
    Module,
    groups_of,
    read_module,
)

# Bytes that each of n devices receives, over the bytes of its operands.
_RECEIVED = {
    "all-gather": lambda n: n - 1,  # the operand is a device's own part
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,  # scattered, then gathered
    "all-to-all": lambda n: (n - 1) / n,
    "ragged-all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
    "collective-broadcast": lambda n: 1,
}
# Lines that touch no memory: names for what is there, or others' lines inside.
_FREE = {
    "after-all",
    "bitcast",
    "call",
    "conditional",
    "constant",
    "get-tuple-element",
    "iota",
    "opt-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
    "while",
}
_PARTS = ("dynamic-slice", "slice", "gather")  # read no more than they give
_START = "AsyncCollectiveStart"


@dataclass(frozen=True)
class Collective:
    """All collectives of one kind over the same axes."""

    kind: str
    axes: tuple[str, ...]  # of the mesh, along which devices talk
    hidden: bool  # the program computes meanwhile
    bytes: float  # that each device receives in a step
    calls: int  # in a step


@dataclass(frozen=True)
class Program:
    """What one step of a program moves, per device."""

    collectives: tuple[Collective, ...]  # largest first
    hbm_bytes: float  # read and written


def read_program(text: str, sizes: dict[str, int]) -> Program:
    """Read a compiled program, everything in a loop as often as the loop runs.

    Bytes of collectives are those that each device receives by the shortest way: of
    n devices with arrays of V bytes in all, (n − 1)/n·V for all-gather, reduce-scatter
    and all-to-all, twice that for all-reduce, and V for a permutation. Arrays count
    without the padding of their layout.

    Args:
        text: `compiled.as_text()`.
        sizes: of the mesh's axes, in order.
    """
    module = read_module(text)
    devices = int(np.prod([*sizes.values()]))
    sums: dict[tuple, list[float]] = defaultdict(lambda: [0.0, 0])
    hbm = 0.0
    for name, line, times, fused in module.walk():
        body = module.computations[name]
        if not fused:
            hbm += times * _memory(module, body, line)
        kind = line.kind.removesuffix("-start")
        if kind not in _RECEIVED or _is_continued(body, line):
            continue
        groups = _groups(line, devices)
        sent = sum(body[operand].bytes for operand in line.operands)
        if kind == "all-reduce" and "all-reduce-scatter" in name:
            kind = "reduce-scatter"  # TPU's compiler fuses it with a slice
        received = times * sent * _RECEIVED[kind](groups.shape[1])
        if received:
            hidden = line.kind.endswith("-start") or fused
            total = sums[kind, _axes(groups, sizes), hidden]
            total[0] += received
            total[1] += times
    found = [Collective(*key, *total) for key, total in sums.items()]
    return Program(tuple(sorted(found, key=lambda c: -c.bytes)), hbm)


def _is_continued(body: Computation, line: Instruction) -> bool:
    """Whether the collective was started elsewhere, and counts there.

    TPU's compiler spreads one over several fusions, of which each holds a copy of it.
    """
    if "chain_id" not in line.rest:
        return False
    return not any(_START in other.rest for other in body.values())


def _groups(line: Instruction, devices: int) -> np.ndarray:
    """Who talks to whom: groups, or for a permutation pairs."""
    if "source_target_pairs=" in line.rest:
        pairs = line.rest.partition("source_target_pairs=")[2]
        return groups_of(f"replica_groups={pairs}", devices)
    return groups_of(line.rest, devices)


def _axes(groups: np.ndarray, sizes: dict[str, int]) -> tuple[str, ...]:
    """The axes of the mesh along which the members of a group differ."""
    places = np.unravel_index(groups, tuple(sizes.values()))
    return tuple(
        name
        for name, place in zip(sizes, places, strict=True)
        if (place != place[:, :1]).any()
    )


def _memory(module: Module, body: Computation, line: Instruction) -> float:
    """Bytes that a line outside of fusions reads from HBM and writes to it."""
    if line.kind in _FREE:
        return 0.0
    if line.kind in _PARTS:
        return 2 * _in_hbm(line)
    if line.kind == "dynamic-update-slice":
        return 2 * _in_hbm(body[line.operands[1]])
    reads, writes = [1.0] * len(line.operands), _in_hbm(line)
    if line.called:
        inside = module.computations[line.called[0]]
        reads = [_share(module, inside, n) for n in range(len(line.operands))]
        if line.kind == "fusion":
            writes = _written(module, inside)
    read = sum(
        _in_hbm(body[operand]) * share
        for operand, share in zip(line.operands, reads, strict=True)
        if operand in body
    )
    if line.kind.endswith("-done"):
        return writes
    return read if line.kind.endswith("-start") else read + writes


def _in_hbm(line: Instruction) -> float:
    return sum(array.bytes for array in line.arrays if array.in_hbm)


def _share(module: Module, computation: Computation, number: int) -> float:
    """How much of a parameter a fusion reads: what it slices, or all."""
    name = next(
        line.name
        for line in computation.values()
        if line.kind == "parameter" and line.rest.startswith(f"{number})")
    )
    whole, read, names = computation[name].bytes, 0.0, {name}
    for line in computation.values():
        taken = names & {*line.operands}
        if not taken or _passes(line):
            continue
        if line.kind == "bitcast":
            names.add(line.name)
        elif line.kind in _PARTS:
            read += line.bytes
        elif line.kind == "dynamic-update-slice" and line.operands[0] in taken:
            continue  # in place
        elif line.kind == "fusion":
            inside = module.computations[line.called[0]]
            places = [n for n, operand in enumerate(line.operands) if operand in taken]
            read += whole * sum(_share(module, inside, place) for place in places)
        elif not (line.kind in _RECEIVED and _is_continued(computation, line)):
            return 1.0
    return min(1.0, read / whole) if whole else 0.0


def _passes(line: Instruction) -> bool:
    """Whether a line only hands on what it is given."""
    return line.root and line.kind in ("tuple", "custom-call")


def _written(module: Module, computation: Computation) -> float:
    """What a fusion writes to HBM: an updated slice, not the array around it."""
    root = next(line for line in computation.values() if line.root)
    if root.kind == "custom-call":  # start or end of a collective
        results = [computation[name] for name in root.operands]
        started = _START in root.rest
        return sum(_in_hbm(x) for x in results if started and x.kind in _RECEIVED)
    if root.kind == "tuple":
        results = [computation[name] for name in root.operands]
    else:
        results = [root]
    total = 0.0
    for line in results:
        while line.kind == "bitcast" and line.operands[0] in computation:
            line = computation[line.operands[0]]
        if line.kind == "dynamic-update-slice":
            line = computation[line.operands[1]]
        elif line.kind == "fusion":
            total += _written(module, module.computations[line.called[0]])
            continue
        elif line.kind == "parameter" or line.kind in _RECEIVED:
            continue
        total += _in_hbm(line)
    return total
