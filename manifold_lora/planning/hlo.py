"""A parser for HLO text: computations, instructions and replica groups.

XLA has no public Python API for compiled programs, so their text is parsed. Only what a
plan needs is kept: the shape, opcode and operands of every instruction, and the rest of
its line.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_CALLED = re.compile(
    r"\b(?:body|calls|to_apply|called_computations|branch_computations)="
    r"(\{[^}]*\}|%?[\w.\-]+)"
)
_BITS = {"pred": 8, "c64": 64, "c128": 128, "token": 0}


@dataclass(frozen=True)
class Array:
    """One array of an instruction's shape."""

    bytes: float
    in_hbm: bool  # rather than in on-chip memory


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    arrays: tuple[Array, ...]  # of its result; several for a tuple
    kind: str  # the opcode, such as "fusion" or "all-gather-start"
    operands: tuple[str, ...]  # names in the same computation
    rest: str  # the line after its operands
    root: bool

    @property
    def bytes(self) -> float:
        """Bytes of the result."""
        return sum(array.bytes for array in self.arrays)

    @property
    def called(self) -> tuple[str, ...]:
        """The computations that it runs, without reducers and loop conditions."""
        if self.kind not in _CALLERS:
            return ()
        called = _CALLED.findall(self.rest)
        return tuple(name for item in called for name in re.findall(r"[\w.\-]+", item))


_CALLERS = {"while", "fusion", "call", "conditional", "custom-call", "async-start"}
Computation = dict[str, Instruction]


@dataclass(frozen=True)
class Module:
    """A compiled program."""

    computations: dict[str, Computation]
    entry: str

    def trip_count(self, loop: Instruction) -> int:
        """The trip count of a loop; if it depends on data, its bound or 1.

        Either annotated by the compiler, or in the name of the scope around it, such as
        `at_most_8_trips`, or the constant with which the condition compares a counter
        that starts at 0.
        """
        if known := re.search(r'known_trip_count"?:\{"n":"(\d+)"', loop.rest):
            return int(known[1])
        if bound := re.search(r"at_most_(\d+)_trips/while\"", loop.rest):
            return int(bound[1])
        condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
        assert condition is not None
        body = self.computations[condition[1]]
        for line in body.values():
            if line.kind != "compare" or "direction=LT" not in line.rest:
                continue
            limit = body.get(line.operands[1])
            if limit is not None and limit.kind == "constant":
                if number := re.match(r"(\d+)\)", limit.rest):
                    return int(number[1])
        return 1

    def walk(self) -> Iterator[tuple[str, Instruction, int, bool]]:
        """Executed instructions: computation, instruction, count, and whether fused."""
        yield from self._visit(self.entry, 1, False)

    def _visit(
        self, name: str, times: int, fused: bool
    ) -> Iterator[tuple[str, Instruction, int, bool]]:
        for line in self.computations[name].values():
            yield name, line, times, fused
            inner_times = times * (self.trip_count(line) if line.kind == "while" else 1)
            inner_fused = fused or line.kind in ("fusion", "async-start", "custom-call")
            for called in line.called:
                yield from self._visit(called, inner_times, inner_fused)


def read_module(text: str) -> Module:
    """Parse the text of a program, such as `compiled.as_text()`."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None:
            if header := _HEADER.match(line):
                current = computations[header[2]] = {}
                entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif match := _INSTRUCTION.match(line):
            root, name, shape, kind, after = match.groups()
            operands, rest = _split_operands(after)
            # The parentheses of a constant or parameter contain its value or number.
            value = kind in ("constant", "parameter")
            current[name] = Instruction(
                name,
                arrays_of(shape),
                kind,
                () if value else tuple(re.findall(r"%([\w.\-]+)", operands)),
                after if value else rest,
                root is not None,
            )
    return Module(computations, entry)


def _split_operands(after: str) -> tuple[str, str]:
    """Split at the parenthesis that closes the operands."""
    depth = 1
    for i, character in enumerate(after):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return after[:i], after[i + 1 :]
    return after, ""


def arrays_of(shape: str) -> tuple[Array, ...]:
    """The arrays of a shape, or of a tuple of shapes.

    >>> [array.bytes for array in arrays_of("(bf16[2,3]{1,0}, f32[])")]
    [12.0, 4.0]
    """
    return tuple(
        Array(
            _bits(kind) / 8 * math.prod(int(n) for n in sizes.split(",") if n),
            "S(" not in (layout or ""),
        )
        for kind, sizes, layout in _ARRAY.findall(shape)
    )


def _bits(kind: str) -> int:
    digits = re.search(r"\d+", kind)
    return _BITS[kind] if kind in _BITS else int(digits[0]) if digits else 0


def groups_of(rest: str, devices: int) -> np.ndarray:
    """The replica groups of a collective, (groups, members), from its line.

    Devices are numbered by their position in the mesh. Three formats are supported:
    lists, `{{0,1},{2,3}}`; a transposed iota, `[2,2]<=[2,2]T(1,0)`; and axes of a mesh
    defined by the compiler, `mesh['a'=2,'b'=2] {'a'}`.

    >>> groups_of("replica_groups=[2,2]<=[2,2]T(1,0)", 4).tolist()
    [[0, 2], [1, 3]]
    >>> groups_of("replica_groups=mesh['a'=2,'b'=2] {'b'}", 4).tolist()
    [[0, 1], [2, 3]]
    """
    if listed := re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", rest):
        rows = re.findall(r"\{([\d,]+)\}", listed[1])
        return np.array([[int(n) for n in row.split(",")] for row in rows])
    iota = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
    if ranged := re.search(r"replica_groups=\[([\d,]+)\]<=" + iota, rest):
        return _iota(ranged[2], ranged[3]).reshape(_numbers(ranged[1]))
    if mesh := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{(.*?)\}", rest
    ):
        sizes = {k: int(n) for k, n in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        ids = np.arange(math.prod(sizes.values()))
        if order := re.match(iota, mesh[2] or ""):
            ids = _iota(order[1], order[2])
        elif mesh[2]:
            ids = np.array(_numbers(mesh[2]))
        return _groups_along(ids, sizes, mesh[3])
    return np.arange(devices)[None]


def _groups_along(ids: np.ndarray, sizes: dict[str, int], axes: str) -> np.ndarray:
    """Groups along axes, or along a sub-axis as in `'a':(2)4`."""
    shape, group_axes = [], []
    sub_axes = {
        name: (int(before or 1), int(size or sizes[name]))
        for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes)
    }
    for name, size in sizes.items():
        if name in sub_axes:
            before, part = sub_axes[name]
            group_axes.append(len(shape) + 1)
            shape += [before, part, size // before // part]
        else:
            shape.append(size)
    last = range(-len(group_axes), 0)
    array = np.moveaxis(ids.reshape(shape), group_axes, last)
    return array.reshape(-1, math.prod(shape[axis] for axis in group_axes))


def _iota(sizes: str, order: str | None) -> np.ndarray:
    shape = _numbers(sizes)
    ids = np.arange(math.prod(shape)).reshape(shape)
    return (ids.transpose(_numbers(order)) if order else ids).reshape(-1)


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]
