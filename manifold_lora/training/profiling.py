"""A trace of a few steps, and the operations that they spend their time in."""

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.profiler import ProfileData
from rich.console import Console

from manifold_lora.checkpoints.atomic import write_text
from manifold_lora.console import PlainTable, print_table, print_text
from manifold_lora.distributed.processes import is_main
from manifold_lora.errors import InputError

# The first steps compile, and warm up the caches of the processor.
_FIRST, _COUNT = 3, 3
_CONTAINERS = ("while", "call", "conditional", "jit_")  # they contain other operations
TABLE = "operations.md"


class Operation(NamedTuple):
    """What all executions of one operation of the compiled program took."""

    name: str
    seconds: float
    calls: int
    share: float  # of the seconds of all operations


def check_directory(directory: Path | None) -> None:
    """Make the directory of a trace before the run, or raise `InputError`."""
    if directory is None:
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"--profile {directory} cannot be made a directory ({error.strerror}): "
            "choose another."
        ) from error


class Profiler:
    """Traces three steps of a run, the fourth to the sixth.

    Args:
        directory: where the trace is written, for TensorBoard, XProf or Perfetto, and
            `operations.md`, the table of the ten costliest operations; None: nothing
            is traced.
        done: steps that were taken before.
        console: where the table is shown.
    """

    def __init__(self, directory: Path | None, done: int, console: Console):
        self._directory = directory if is_main() else None
        self._console = console
        self._first = done + _FIRST
        self._running = False

    def before_step(self, step: int, arrays: Any) -> None:
        """Start or stop the trace; called with the steps taken and their result."""
        if self._directory is None:
            return
        if step == self._first:
            jax.block_until_ready(arrays)
            jax.profiler.start_trace(str(self._directory))
            self._running = True
        elif step == self._first + _COUNT:
            self.stop(arrays)

    def finish(self, step: int, arrays: Any) -> None:
        """End the trace after the last step; says so where none began."""
        self.stop(arrays)
        if self._directory is not None and step <= self._first:
            print_text(
                self._console,
                f"--profile: nothing was traced, since the trace begins after {_FIRST} "
                "steps. Take more --steps.",
            )

    def stop(self, arrays: Any) -> None:
        """End the trace, if there is one, and show the table."""
        if not self._running:
            return
        assert self._directory is not None
        jax.block_until_ready(arrays)
        self._running = False
        try:
            jax.profiler.stop_trace()
        except jax.errors.JaxRuntimeError as error:  # such as a full disk
            print_text(self._console, f"--profile: the trace was not written: {error}")
            return
        traces = self._directory.glob("plugins/profile/*/*.xplane.pb")
        newest = max(traces, key=lambda file: file.stat().st_mtime)
        _show(self._console, costliest(newest), self._directory)


def costliest(trace: Path, count: int = 10) -> list[Operation]:
    """The operations of a trace that took most, on all devices together.

    Loops and calls are left out, as what they contain is counted by itself.

    Args:
        trace: an .xplane.pb file.
        count: how many.
    """
    seconds: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for plane in ProfileData.from_file(str(trace)).planes:
        for line in plane.lines:
            for event in line.events:
                operation = dict(event.stats).get("hlo_op")
                if operation is None and line.name == "XLA Ops":
                    operation = event.name
                if operation is None or str(operation).startswith(_CONTAINERS):
                    continue
                seconds[str(operation)] += event.duration_ns / 1e9
                counts[str(operation)] += 1
    total = sum(seconds.values())
    return [
        Operation(name, value, counts[name], value / total)
        for name, value in seconds.most_common(count)
    ]


def _show(console: Console, operations: list[Operation], directory: Path) -> None:
    columns = ("operation", "seconds", "calls", "share")
    rows = [
        (each.name, f"{each.seconds:.3f}", str(each.calls), f"{each.share:.1%}")
        for each in operations
    ]
    lines = ["| " + " | ".join(row) + " |" for row in [columns, *rows]]
    lines.insert(1, "|---|---|---|---|")
    write_text(directory / TABLE, "\n".join(lines) + "\n")
    table = PlainTable("Costliest operations")
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*row)
    print_table(console, table)
    print_text(console, f"The trace is in {directory}.")
