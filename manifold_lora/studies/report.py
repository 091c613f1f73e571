"""What came of a comparison: numbers, a table and a picture."""

from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from manifold_lora.evaluation.plots import plot_comparison
from manifold_lora.studies.config import Plan

TABLE, PICTURE = "compare.md", "compare.png"
_COLUMNS = (
    "method",
    "rank",
    "parameters",
    "rate",
    "held-out loss",
    "accuracy",
    "steps to baseline",
    "seconds to it",
    "overhead",
    "residual",
    "rank of B",
    "rank of ΔW",
)
# Those that 80 columns hold; the file has all.
_ON_TERMINAL = ("method", "rate", "held-out loss", "steps to baseline", "overhead")


def summarise(content: dict[str, Any], plan: Plan, steps: int) -> list[dict[str, Any]]:
    """A row for every method, best first, from the runs of full length."""
    runs = {name: _final(content, name) for name in plan.runs}
    ends = [c["curve"][-1]["loss"] for c in runs[plan.baseline] if not c["diverged"]]
    goal = float(np.mean(ends)) if ends else float("-inf")
    seconds = content["step_seconds"]
    rows = []
    for name, cells in runs.items():
        whole = [cell for cell in cells if not cell["diverged"]]
        row: dict[str, Any] = {
            "method": name,
            "rank": cells[0]["rank"],
            "parameters": cells[0]["trainable"],
            "rates": cells[0]["rates"],
            "seeds": len(cells),
            "diverged": len(cells) - len(whole),
            "overhead": seconds[name] / seconds[plan.baseline],
            "step_seconds": seconds[name],
        }
        if whole:
            last = [cell["final"] for cell in whole]
            curve = mean_curve(whole)
            reached = steps_to(curve, goal)
            row |= {
                "loss": _mean_std([x["loss"] for x in last]),
                "accuracy": _mean_std([x["accuracy"] for x in last]),
                "training_loss": _mean_std(
                    [float(np.mean(c["losses"][-max(1, steps // 10) :])) for c in whole]
                ),
                "steps_to_baseline": reached,
                "share_of_steps": None if reached is None else reached / steps,
                "seconds_to_baseline": None
                if reached is None
                else reached * seconds[name],
                "largest_residual": max(c["largest_residual"] for c in whole),
                "last_residual": max(c["last_residual"] for c in whole),
                "effective_rank_b": _mean_std([c["effective_rank_b"] for c in whole]),
                "least_effective_rank_b": min(
                    c["least_effective_rank_b"] for c in whole
                ),
                "effective_rank_update": _mean_std(
                    [c["effective_rank_update"] for c in whole]
                ),
            }
        rows.append(row)
    return sorted(rows, key=lambda row: row.get("loss", [float("inf")])[0])


def _final(content: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """The runs of full length of a method."""
    return [
        cell
        for key, cell in content["cells"].items()
        if cell["method"] == name and not key.endswith(" search")
    ]


def mean_curve(cells: list[dict[str, Any]]) -> np.ndarray:
    """Steps and held-out loss of every evaluation, (evaluations, 1 + runs)."""
    steps = [point["step"] for point in cells[0]["curve"]]
    losses = [[point["loss"] for point in cell["curve"]] for cell in cells]
    return np.array([steps, *losses], float).T


def steps_to(curve: np.ndarray, goal: float) -> float | None:
    """The first step at which the mean of the runs is as low as the goal, or None.

    Between evaluations the loss is taken to be a straight line.

    >>> steps_to(np.array([[0.0, 3.0], [10.0, 1.0]]), 2.0)
    5.0
    """
    steps, losses = curve[:, 0], curve[:, 1:].mean(1)
    for i, loss in enumerate(losses):
        if loss <= goal:
            if i == 0:
                return float(steps[0])
            share = (losses[i - 1] - goal) / (losses[i - 1] - loss)
            return float(steps[i - 1] + share * (steps[i] - steps[i - 1]))
    return None


def _mean_std(values: list[float]) -> list[float]:
    """Mean and standard deviation (of a sample; 0 for one value)."""
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return [float(np.mean(values)), spread]


def _texts(row: dict[str, Any]) -> list[str]:
    rates = " / ".join(f"{rate:g}" for rate in row["rates"])
    texts = [row["method"], str(row["rank"]), f"{row['parameters']:,}", rates]
    if "loss" not in row:
        return [*texts, "diverged", *[""] * 3, f"{row['overhead']:.2f} ×", *[""] * 3]
    reached = row["steps_to_baseline"]
    diverged = f" ({row['diverged']} diverged)" if row["diverged"] else ""
    return [
        *texts,
        f"{row['loss'][0]:.4f} ± {row['loss'][1]:.4f}{diverged}",
        f"{row['accuracy'][0]:.1%} ± {row['accuracy'][1]:.1%}",
        "not reached"
        if reached is None
        else f"{reached:.0f} ({row['share_of_steps']:.0%})",
        "" if reached is None else f"{row['seconds_to_baseline']:.0f}",
        f"{row['overhead']:.2f} ×",
        f"{row['largest_residual']:.0e}" if row["largest_residual"] else "–",
        f"{row['effective_rank_b'][0]:.2f}",
        f"{row['effective_rank_update'][0]:.2f}",
    ]


def show_table(console: Console, content: dict[str, Any]) -> None:
    """The table on the terminal."""
    table = Table(title="Comparison, best first", title_justify="left", box=None)
    shown = [_COLUMNS.index(name) for name in _ON_TERMINAL]
    for name in _ON_TERMINAL:
        table.add_column(name, justify="left" if name == "method" else "right")
    for row in content["summary"]:
        texts = _texts(row)
        table.add_row(*[texts[place] for place in shown])
    console.print(table)
    console.print(_note(content), style="dim", soft_wrap=True)


def write(out: Path, content: dict[str, Any]) -> None:
    """The table as Markdown, and the picture."""
    lines = ["| " + " | ".join(_COLUMNS) + " |", "|" + "---|" * len(_COLUMNS)]
    for row in content["summary"]:
        texts = _texts(row)
        lines.append("| " + " | ".join([f"`{texts[0]}`", *texts[1:]]) + " |")
    text = "\n".join([*lines, "", _note(content)]) + "\n"
    (out / TABLE).write_text(text, encoding="utf-8")
    curves = {
        row["method"]: mean_curve(
            [c for c in _final(content, row["method"]) if not c["diverged"]]
        )
        for row in content["summary"]
        if "loss" in row
    }
    plot_comparison(out / PICTURE, curves, content["settings"]["baseline"])


def _note(content: dict[str, Any]) -> str:
    baseline = content["settings"]["baseline"]
    seeds = len(content["settings"]["seeds"])
    return (
        f"Mean ± standard deviation over {seeds} seeds. To baseline: steps and seconds "
        f"until the held-out loss with which {baseline} ends; overhead: median time of "
        f"a step over {baseline}'s; residual: largest distance from the manifold; "
        "ranks: entropy effective ranks, mean over layers and modules."
    )
