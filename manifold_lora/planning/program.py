"""Communication and memory traffic of a compiled program."""

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

# Bytes that each of n devices receives, per byte of its operands.
_RECEIVED = {
    "all-gather": lambda n: n - 1,  # the operand is the device's shard
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,  # reduce-scatter, then all-gather
    "all-to-all": lambda n: (n - 1) / n,
    "ragged-all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
    "collective-broadcast": lambda n: 1,
}
# Instructions without memory traffic of their own.
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
_SLICES = ("dynamic-slice", "slice", "gather")  # read as much as they return
_START = "AsyncCollectiveStart"


@dataclass(frozen=True)
class Collective:
    """All collectives of one kind over the same mesh axes."""

    kind: str
    axes: tuple[str, ...]  # of the mesh, along which devices communicate
    hidden: bool  # overlapped with computation
    bytes: float  # received by each device per step
    calls: int  # per step


@dataclass(frozen=True)
class Program:
    """Communication and memory traffic of one step, per device."""

    collectives: tuple[Collective, ...]  # largest first
    hbm_bytes: float  # reads and writes


def read_program(text: str, sizes: dict[str, int]) -> Program:
    """Analyse a compiled program, with loops multiplied by their trip counts.

    Bytes of a collective are the minimum that each device must receive: for n devices
    and arrays of V bytes in total, (n − 1)/n·V for all-gather, reduce-scatter and
    all-to-all, twice that for all-reduce, and V for a permutation. The padding of
    layouts is not counted.

    Args:
        text: `compiled.as_text()`.
        sizes: of the mesh axes, in order.
    """
    module = read_module(text)
    devices = int(np.prod([*sizes.values()]))
    sums: dict[tuple, list[float]] = defaultdict(lambda: [0.0, 0])
    hbm = 0.0
    for name, line, times, fused in module.walk():
        body = module.computations[name]
        if not fused:
            hbm += times * _hbm_traffic(module, body, line)
        kind = line.kind.removesuffix("-start")
        if kind not in _RECEIVED or _is_continuation(body, line):
            continue
        groups = _groups(line, devices)
        operand_bytes = sum(body[operand].bytes for operand in line.operands)
        if kind == "all-reduce" and "all-reduce-scatter" in name:
            kind = "reduce-scatter"  # the TPU compiler's fusion with a slice
        received = times * operand_bytes * _RECEIVED[kind](groups.shape[1])
        if received:
            hidden = line.kind.endswith("-start") or fused
            total = sums[kind, _axes(groups, sizes), hidden]
            total[0] += received
            total[1] += times
    collectives = [Collective(*key, *total) for key, total in sums.items()]
    return Program(tuple(sorted(collectives, key=lambda c: -c.bytes)), hbm)


def _is_continuation(body: Computation, line: Instruction) -> bool:
    """Whether the collective is a copy of one that was started, and counted, elsewhere.

    The TPU compiler spreads a collective over several fusions with a copy in each.
    """
    if "chain_id" not in line.rest:
        return False
    return not any(_START in other.rest for other in body.values())


def _groups(line: Instruction, devices: int) -> np.ndarray:
    """The groups of a collective, or the pairs of a permutation."""
    if "source_target_pairs=" in line.rest:
        pairs = line.rest.partition("source_target_pairs=")[2]
        return groups_of(f"replica_groups={pairs}", devices)
    return groups_of(line.rest, devices)


def _axes(groups: np.ndarray, sizes: dict[str, int]) -> tuple[str, ...]:
    """The axes of the mesh along which the members of a group differ."""
    coordinates = np.unravel_index(groups, tuple(sizes.values()))
    return tuple(
        name
        for name, coordinate in zip(sizes, coordinates, strict=True)
        if (coordinate != coordinate[:, :1]).any()
    )


def _hbm_traffic(module: Module, body: Computation, line: Instruction) -> float:
    """HBM bytes read and written by an instruction outside fusions."""
    if line.kind in _FREE:
        return 0.0
    if line.kind in _SLICES:
        return 2 * _in_hbm(line)
    if line.kind == "dynamic-update-slice":
        return 2 * _in_hbm(body[line.operands[1]])
    reads, writes = [1.0] * len(line.operands), _in_hbm(line)
    if line.called:
        inside = module.computations[line.called[0]]
        reads = [_fraction_read(module, inside, n) for n in range(len(line.operands))]
        if line.kind == "fusion":
            writes = _hbm_written(module, inside)
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


def _fraction_read(module: Module, computation: Computation, number: int) -> float:
    """The fraction of a parameter that a fusion reads: its slices, or all of it."""
    name = next(
        line.name
        for line in computation.values()
        if line.kind == "parameter" and line.rest.startswith(f"{number})")
    )
    size, read, names = computation[name].bytes, 0.0, {name}
    for line in computation.values():
        used = names & {*line.operands}
        if not used or _is_pass_through(line):
            continue
        if line.kind == "bitcast":
            names.add(line.name)
        elif line.kind in _SLICES:
            read += line.bytes
        elif line.kind == "dynamic-update-slice" and line.operands[0] in used:
            continue  # updated in place
        elif line.kind == "fusion":
            inside = module.computations[line.called[0]]
            numbers = [n for n, operand in enumerate(line.operands) if operand in used]
            read += size * sum(_fraction_read(module, inside, n) for n in numbers)
        elif not (line.kind in _RECEIVED and _is_continuation(computation, line)):
            return 1.0
    return min(1.0, read / size) if size else 0.0


def _is_pass_through(line: Instruction) -> bool:
    """Whether an instruction only returns its operands."""
    return line.root and line.kind in ("tuple", "custom-call")


def _hbm_written(module: Module, computation: Computation) -> float:
    """HBM bytes written by a fusion: of an in-place update, only the slice."""
    root = next(line for line in computation.values() if line.root)
    if root.kind == "custom-call":  # the start or end of a collective
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
            total += _hbm_written(module, module.computations[line.called[0]])
            continue
        elif line.kind == "parameter" or line.kind in _RECEIVED:
            continue
        total += _in_hbm(line)
    return total
