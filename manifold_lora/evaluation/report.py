"""The result of an evaluation: summary, table, and the predictions that changed."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from manifold_lora.checkpoints.atomic import write_text
from manifold_lora.console import PlainTable, print_table, print_text
from manifold_lora.evaluation.measures import Row
from manifold_lora.evaluation.predictions import (
    CHANGED,
    PREDICTIONS,
    SUMMARY,
    TABLE,
    Predictions,
)
from manifold_lora.evaluation.suite import Suite

MEAN = "mean"  # over the tasks, each counted once
SHOWN = 5  # predictions that changed, on the terminal


def summarise(
    suite: Suite, predictions: Predictions, names: Sequence[str]
) -> dict[str, Any]:
    """The measures of every system, and the differences from the first one."""
    systems = {}
    for name in names:
        rows = {task: predictions.of(name, task) for task in suite.sizes}
        tasks = {task: suite.summarise(found) for task, found in rows.items()}
        if len(tasks) > 1:
            tasks[MEAN] = {
                measure: sum(values[measure] for values in tasks.values()) / len(tasks)
                for measure in next(iter(tasks.values()))
            }
        seconds = sum(row["seconds"] for found in rows.values() for row in found)
        systems[name] = {"seconds": round(seconds, 2), "tasks": tasks}
    first, *others = names
    differences = {
        name: {
            task: {
                measure: found._asdict()
                for measure, found in suite.compare(
                    [predictions.of(first, t) for t in part],
                    [predictions.of(name, t) for t in part],
                ).items()
            }
            for task, part in _parts(suite)
        }
        for name in others
    }
    return {
        "records": dict(suite.sizes),
        "systems": systems,
        "differences": {"from": first, "of": differences} if others else {},
    }


def _parts(suite: Suite) -> Iterator[tuple[str, list[str]]]:
    """Each task by itself, and all of them."""
    yield from ((task, [task]) for task in suite.sizes)
    if len(suite.sizes) > 1:
        yield MEAN, list(suite.sizes)


def changes(
    suite: Suite, predictions: Predictions, names: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """The records of which the first system and another one predict differently."""
    first, *others = names
    for name in others:
        for task in suite.sizes:
            pairs = zip(
                predictions.of(first, task), predictions.of(name, task), strict=True
            )
            for before, after in pairs:
                if suite.outcome(before) != suite.outcome(after):
                    record, told, truth = suite.describe(task, before)
                    yield {
                        "system": name,
                        "task": task,
                        "record": before["record"],
                        "text": record,
                        "truth": truth,
                        first: told,
                        name: suite.describe(task, after)[1],
                    }


def write(out: Path, summary: Mapping[str, Any], changed: Sequence[Row]) -> None:
    """Write changed.jsonl, table.md and, last, evaluation.json."""
    write_text(out / CHANGED, "".join(json.dumps(row) + "\n" for row in changed))
    header, *rows = table(summary)
    lines = [header, ["---"] * len(header), *rows]
    text = "".join("| " + " | ".join(line) + " |\n" for line in lines)
    write_text(out / TABLE, text)
    text = json.dumps(_finite(summary), indent=1, allow_nan=False) + "\n"
    write_text(out / SUMMARY, text)


def _finite(value: Any) -> Any:
    """The value with null for NaN and infinity, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def table(summary: Mapping[str, Any]) -> list[list[str]]:
    """The header and the rows of one table: a task and measure in each."""
    systems, differences = summary["systems"], summary["differences"]
    others = differences.get("of", {})
    header = ["task", "records", "measure", *systems]
    header += [f"{name} − {differences['from']} [95 %]" for name in others]
    rows = []
    tasks = next(iter(systems.values()))["tasks"]
    total = sum(summary["records"].values())
    for task, measures in tasks.items():
        for measure in measures:
            row = [task, str(summary["records"].get(task, total)), measure]
            row += [f"{x['tasks'][task][measure]:.4f}" for x in systems.values()]
            for found in others.values():
                if (x := found[task].get(measure)) is None:
                    row.append("")
                else:
                    row.append(f"{x['value']:+.4f} [{x['low']:+.4f}, {x['high']:+.4f}]")
            rows.append(row)
    seconds = [f"{x['seconds']:.1f}" for x in systems.values()]
    last = ["all", str(total), "seconds", *seconds, *[""] * len(others)]
    return [header, *rows, last]


def show(
    console: Console, out: Path, summary: Mapping[str, Any], changed: Sequence[Row]
) -> None:
    """The table, some predictions that changed, and where all of it is."""
    header, *rows = table(summary)
    shown = PlainTable("Evaluation")
    for name in header:
        shown.add_column(name)
    for row in rows:
        shown.add_row(*row)
    print_table(console, shown)
    if changed:
        some = PlainTable(f"Predictions that changed ({len(changed):,})")
        for name in ("task", "text", "before", "after", "truth"):
            some.add_column(name)
        for row in changed[:SHOWN]:
            before, after = row[summary["differences"]["from"]], row[row["system"]]
            text = row["text"] if len(row["text"]) <= 60 else f"…{row['text'][-59:]}"
            some.add_row(row["task"], text, before, after, row["truth"])
        print_table(console, some)
    names = (SUMMARY, TABLE, PREDICTIONS, *([CHANGED] if changed else []))
    print_text(console, f"Wrote {', '.join(str(out / name) for name in names)}")
