"""The results of a comparison: a summary, a table and a plot."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from manifold_lora.checkpoints.atomic import write_text
from manifold_lora.comparison.plot import plot_comparison
from manifold_lora.comparison.results import PLOT, SEARCH, TABLE
from manifold_lora.console import PlainTable, print_table, print_text

Result = dict[str, Any]
_COLUMNS = (
    "method",
    "rank",
    "parameters",
    "learning rate",
    "held-out loss",
    "accuracy",
    "exact match",
    "steps to baseline",
    "seconds to baseline",
    "step time",
    "constraint violation",
    "effective rank of B",
    "effective rank of ΔW",
)
# The columns that fit into a terminal of 80 characters.
_ON_TERMINAL = (
    "method",
    "learning rate",
    "held-out loss",
    "steps to baseline",
    "step time",
)


def summarise(content: dict[str, Any], steps: int) -> list[dict[str, Any]]:
    """One row per method from its full-length runs, best first.

    Statistics are over the runs that did not diverge, and missing if all did. Steps and
    seconds to the baseline are those until the mean curve of the method reaches the
    final mean loss of the baseline: the held-out loss and, under `training`, the
    smoothed training loss.
    """
    baseline, seconds = content["settings"]["baseline"], content["step_seconds"]
    rows = []
    for name in content["settings"]["runs"]:
        results, converged = _full_runs(content, name), _converged(content, name)
        row: dict[str, Any] = {
            "method": name,
            "rank": results[0]["rank"],
            "parameters": results[0]["trainable"],
            "rates": results[0]["rates"],
            "at_edge": _at_edge(content, name, results[0]["rates"]),
            "seeds": len(results),
            "diverged": len(results) - len(converged),
            "overhead": seconds[name] / seconds[baseline],
            "step_seconds": seconds[name],
        }

        def to_baseline(
            curve: Callable[[list[Result]], np.ndarray], name: str = name
        ) -> dict[str, Any]:
            reached, references = None, _converged(content, baseline)
            if references:
                target = float(curve(references)[-1, 1:].mean())
                reached = steps_to(curve(_converged(content, name)), target)
            never = reached is None
            return {
                "steps_to_baseline": reached,
                "share_of_steps": None if never else reached / steps,
                "seconds_to_baseline": None if never else reached * seconds[name],
            }

        if converged:
            row |= _statistics(converged) | to_baseline(mean_curve)
            row["training"] = to_baseline(training_curve)
        rows.append(row)
    return sorted(rows, key=lambda row: row.get("loss", [float("inf")])[0])


def _statistics(results: list[Result]) -> dict[str, Any]:
    """Statistics over the runs of a method, none of which diverged."""
    final = [result["final"] for result in results]
    return {
        "loss": _mean_std([evaluation["loss"] for evaluation in final]),
        "accuracy": _mean_std([evaluation["accuracy"] for evaluation in final]),
        "exact_match": _mean_std([evaluation["exact_match"] for evaluation in final]),
        "training_loss": _mean_std(training_curve(results)[-1, 1:]),
        "largest_residual": max(result["largest_residual"] for result in results),
        "last_residual": max(result["last_residual"] for result in results),
        "effective_rank_b": _mean_std(
            [result["effective_rank_b"] for result in results]
        ),
        "least_effective_rank_b": min(
            result["least_effective_rank_b"] for result in results
        ),
        "effective_rank_update": _mean_std(
            [result["effective_rank_update"] for result in results]
        ),
    }


def _full_runs(content: dict[str, Any], name: str) -> list[Result]:
    """The full-length runs of a method."""
    return [
        result
        for key, result in content["cells"].items()
        if result["method"] == name and not key.endswith(SEARCH)
    ]


def _converged(content: dict[str, Any], name: str) -> list[Result]:
    """The full-length runs of a method that did not diverge."""
    return [run for run in _full_runs(content, name) if not run["diverged"]]


def mean_curve(results: list[Result]) -> np.ndarray:
    """Steps and held-out losses of every evaluation, (evaluations, 1 + runs)."""
    steps = [point["step"] for point in results[0]["curve"]]
    losses = [[point["loss"] for point in result["curve"]] for result in results]
    return np.array([steps, *losses], float).T


def training_curve(results: list[Result]) -> np.ndarray:
    """Steps and training losses, averaged over a tenth of a run, (steps, 1 + runs)."""
    window = max(1, len(results[0]["losses"]) // 10)
    weights = np.full(window, 1 / window)
    smooth = [
        np.convolve(result["losses"], weights, mode="valid") for result in results
    ]
    return np.array([window + np.arange(len(smooth[0])), *smooth], float).T


def steps_to(curve: np.ndarray, target: float) -> float | None:
    """The first step at which the mean loss of the runs reaches the target, or None.

    Losses are interpolated linearly between evaluations.

    >>> steps_to(np.array([[0.0, 3.0], [10.0, 1.0]]), 2.0)
    5.0
    """
    steps, losses = curve[:, 0], curve[:, 1:].mean(1)
    below = np.flatnonzero(losses <= target)
    if not below.size:
        return None
    i = below[0]
    if i == 0:
        return float(steps[0])
    share = (losses[i - 1] - target) / (losses[i - 1] - losses[i])
    return float(steps[i - 1] + share * (steps[i] - steps[i - 1]))


def _mean_std(values: Sequence[float] | np.ndarray) -> list[float]:
    """Mean and sample standard deviation (0 for one value)."""
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return [float(np.mean(values)), spread]


def _at_edge(content: dict[str, Any], method: str, best: list[float]) -> bool:
    """Whether a best rate of the method is the smallest or the largest tried."""
    tried = [
        result["rates"]
        for key, result in content["cells"].items()
        if result["method"] == method and key.endswith(SEARCH)
    ]
    return any(
        rate in (min(rates), max(rates))
        for rate, *rates in zip(best, *tried, strict=True)
    )


def _texts(row: dict[str, Any]) -> list[str]:
    """The cells of a row, in the order of `_COLUMNS`."""
    rates = " / ".join(f"{rate:g}" for rate in row["rates"])
    rates += " (edge)" if row["at_edge"] else ""
    texts = [row["method"], str(row["rank"]), f"{row['parameters']:,}", rates]
    if "loss" not in row:
        return [*texts, "diverged", *[""] * 4, f"{row['overhead']:.2f} ×", *[""] * 3]
    reached = row["steps_to_baseline"]
    diverged = f" ({row['diverged']} diverged)" if row["diverged"] else ""
    return [
        *texts,
        f"{row['loss'][0]:.4f} ± {row['loss'][1]:.4f}{diverged}",
        f"{row['accuracy'][0]:.1%} ± {row['accuracy'][1]:.1%}",
        f"{row['exact_match'][0]:.1%} ± {row['exact_match'][1]:.1%}",
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
    """Print the table."""
    table = PlainTable("Comparison, best first")
    shown = [_COLUMNS.index(name) for name in _ON_TERMINAL]
    for name in _ON_TERMINAL:
        table.add_column(name, justify="left" if name == "method" else "right")
    for row in content["summary"]:
        texts = _texts(row)
        table.add_row(*[texts[i] for i in shown])
    print_table(console, table)
    print_text(console, _note(content), "dim")


def write(out: Path, content: dict[str, Any]) -> None:
    """Write the table as Markdown, and the plot."""
    lines = ["| " + " | ".join(_COLUMNS) + " |"]
    lines.append("|---|" + "---:|" * (len(_COLUMNS) - 1))
    for row in content["summary"]:
        texts = _texts(row)
        lines.append("| " + " | ".join([f"`{texts[0]}`", *texts[1:]]) + " |")
    text = "\n".join([*lines, "", _note(content)]) + "\n"
    write_text(out / TABLE, text)
    curves = {
        row["method"]: mean_curve(_converged(content, row["method"]))
        for row in content["summary"]
        if "loss" in row
    }
    plot_comparison(out / PLOT, curves, content["settings"]["baseline"])


def _note(content: dict[str, Any]) -> str:
    settings, held_out = content["settings"], content["held_out"]
    baseline, seeds = settings["baseline"], settings["seeds"]
    edges = any(row["at_edge"] for row in content["summary"])
    source = "of --eval-data" if held_out["test_is_eval_data"] else "held out"
    return (
        ("(edge): a best rate is the smallest or the largest tried. " if edges else "")
        + f"Rates: of the lowest loss on {held_out['validation']:,} validation "
        f"examples, with seed {settings['search_seed']}. Results: on "
        f"{held_out['test']:,} test examples {source}, mean ± standard deviation over "
        f"seeds {', '.join(map(str, seeds))}. To baseline: until the "
        f"held-out loss reaches the final one of {baseline}; step time: median, "
        f"relative to {baseline}; accuracy: of answer tokens; exact match: of whole "
        "answers; constraint violation: maximum over the run; effective rank: entropy "
        "effective rank, mean over layers and modules."
    )
