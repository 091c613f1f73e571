"""What came of a comparison: numbers, a table and a picture."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from manifold_lora.comparison.cells import PICTURE, TABLE
from manifold_lora.comparison.plot import plot_comparison

Cell = dict[str, Any]
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


def summarise(content: dict[str, Any], steps: int) -> list[dict[str, Any]]:
    """A row for every method, best first, from the runs of full length.

    Numbers are over the runs that did not diverge; a method without any has none.
    Steps and seconds to the baseline are to where the mean of a method's curves is as
    low as that of the baseline's in the end: of the held-out loss and, in `training`,
    of the smoothed training loss.
    """
    baseline, seconds = content["settings"]["baseline"], content["step_seconds"]
    rows = []
    for name in content["settings"]["runs"]:
        cells, whole = _final(content, name), _whole(content, name)
        row: dict[str, Any] = {
            "method": name,
            "rank": cells[0]["rank"],
            "parameters": cells[0]["trainable"],
            "rates": cells[0]["rates"],
            "seeds": len(cells),
            "diverged": len(cells) - len(whole),
            "overhead": seconds[name] / seconds[baseline],
            "step_seconds": seconds[name],
        }

        def race(
            curve: Callable[[list[Cell]], np.ndarray], name: str = name
        ) -> dict[str, Any]:
            reached, rivals = None, _whole(content, baseline)
            if rivals:
                goal = float(curve(rivals)[-1, 1:].mean())
                reached = steps_to(curve(_whole(content, name)), goal)
            never = reached is None
            return {
                "steps_to_baseline": reached,
                "share_of_steps": None if never else reached / steps,
                "seconds_to_baseline": None if never else reached * seconds[name],
            }

        if whole:
            row |= _numbers(whole) | race(mean_curve)
            row["training"] = race(training_curve)
        rows.append(row)
    return sorted(rows, key=lambda row: row.get("loss", [float("inf")])[0])


def _numbers(cells: list[Cell]) -> dict[str, Any]:
    """Those of runs that did not diverge."""
    last = [cell["final"] for cell in cells]
    return {
        "loss": _mean_std([end["loss"] for end in last]),
        "accuracy": _mean_std([end["accuracy"] for end in last]),
        "training_loss": _mean_std(training_curve(cells)[-1, 1:]),
        "largest_residual": max(cell["largest_residual"] for cell in cells),
        "last_residual": max(cell["last_residual"] for cell in cells),
        "effective_rank_b": _mean_std([cell["effective_rank_b"] for cell in cells]),
        "least_effective_rank_b": min(cell["least_effective_rank_b"] for cell in cells),
        "effective_rank_update": _mean_std(
            [cell["effective_rank_update"] for cell in cells]
        ),
    }


def _final(content: dict[str, Any], name: str) -> list[Cell]:
    """The runs of full length of a method."""
    return [
        cell
        for key, cell in content["cells"].items()
        if cell["method"] == name and not key.endswith(" search")
    ]


def _whole(content: dict[str, Any], name: str) -> list[Cell]:
    """Those that did not diverge."""
    return [cell for cell in _final(content, name) if not cell["diverged"]]


def mean_curve(cells: list[Cell]) -> np.ndarray:
    """Steps and held-out loss of every evaluation, (evaluations, 1 + runs)."""
    steps = [point["step"] for point in cells[0]["curve"]]
    losses = [[point["loss"] for point in cell["curve"]] for cell in cells]
    return np.array([steps, *losses], float).T


def training_curve(cells: list[Cell]) -> np.ndarray:
    """Likewise of the training loss: its mean over the last tenth of a run's steps."""
    window = max(1, len(cells[0]["losses"]) // 10)
    weights = np.full(window, 1 / window)
    smooth = [np.convolve(cell["losses"], weights, mode="valid") for cell in cells]
    return np.array([window + np.arange(len(smooth[0])), *smooth], float).T


def steps_to(curve: np.ndarray, goal: float) -> float | None:
    """The first step at which the mean of the runs is as low as the goal, or None.

    Between evaluations the loss is taken to be a straight line.

    >>> steps_to(np.array([[0.0, 3.0], [10.0, 1.0]]), 2.0)
    5.0
    """
    steps, losses = curve[:, 0], curve[:, 1:].mean(1)
    below = np.flatnonzero(losses <= goal)
    if not below.size:
        return None
    i = below[0]
    if i == 0:
        return float(steps[0])
    share = (losses[i - 1] - goal) / (losses[i - 1] - losses[i])
    return float(steps[i - 1] + share * (steps[i] - steps[i - 1]))


def _mean_std(values: Sequence[float] | np.ndarray) -> list[float]:
    """Mean and standard deviation (of a sample; 0 for one value)."""
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return [float(np.mean(values)), spread]


def at_edge(content: dict[str, Any], row: dict[str, Any]) -> bool:
    """Whether a best rate of a method is the least or the largest that was tried."""
    tried = [
        cell["rates"]
        for key, cell in content["cells"].items()
        if cell["method"] == row["method"] and key.endswith(" search")
    ]
    return any(
        rate in (min(rates), max(rates))
        for rate, *rates in zip(row["rates"], *tried, strict=True)
    )


def _texts(row: dict[str, Any], content: dict[str, Any]) -> list[str]:
    """The row's cells, in the order of `_COLUMNS`."""
    rates = " / ".join(f"{rate:g}" for rate in row["rates"])
    rates += " (edge)" if at_edge(content, row) else ""
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
        texts = _texts(row, content)
        table.add_row(*[texts[place] for place in shown])
    console.print(table)
    console.print(_note(content), style="dim", soft_wrap=True)


def write(out: Path, content: dict[str, Any]) -> None:
    """The table as Markdown, and the picture."""
    lines = ["| " + " | ".join(_COLUMNS) + " |"]
    lines.append("|---|" + "---:|" * (len(_COLUMNS) - 1))
    for row in content["summary"]:
        texts = _texts(row, content)
        lines.append("| " + " | ".join([f"`{texts[0]}`", *texts[1:]]) + " |")
    text = "\n".join([*lines, "", _note(content)]) + "\n"
    (out / TABLE).write_text(text, encoding="utf-8")
    curves = {
        row["method"]: mean_curve(_whole(content, row["method"]))
        for row in content["summary"]
        if "loss" in row
    }
    plot_comparison(out / PICTURE, curves, content["settings"]["baseline"])


def _note(content: dict[str, Any]) -> str:
    baseline = content["settings"]["baseline"]
    seeds = len(content["settings"]["seeds"])
    edges = any(at_edge(content, row) for row in content["summary"])
    return (
        ("(edge): a best rate is the least or the largest tried. " if edges else "")
        + f"Mean ± standard deviation over {seeds} seeds. To baseline: steps and "
        f"seconds until the held-out loss with which {baseline} ends; overhead: median "
        f"time of a step over {baseline}'s; residual: largest distance from the "
        "manifold; ranks: entropy effective ranks, mean over layers and modules."
    )
