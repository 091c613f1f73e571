"""Test three predictions of the papers on finished comparisons.

    cd runs/studies && python ../../examples/studies/predictions.py default \
        --random fixed_a_random --projection fixed_a_projection

(a) The effective rank of B stays r for Stiefel methods and drops for AdamW.
(b) Training both factors is far better than fixing A at a projection of the weight,
which is better than fixing A at random. (c) Landing and Stiefel methods reach the final
loss of LoRA with AdamW in about half the steps. Prints a Markdown table for each, with
the criterion and the verdict, and plots the loss curves and the ranks.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from matplotlib.figure import Figure

STIEFEL = ("stiefel", "stiefel_dora", "landing_stiefel")
FASTER = (*STIEFEL, "landing_oblique")
Row = dict[str, Any]


def rows(folder: Path) -> dict[str, Row]:
    """The summary of a comparison, by method."""
    content = json.loads((folder / "compare.json").read_text(encoding="utf-8"))
    return {row["method"]: row for row in content["summary"]}


def smooth(losses: list[float], steps: int) -> np.ndarray:
    """The running mean over a fifteenth of the run, without partial windows."""
    window = max(1, steps // 15)
    return np.convolve(losses, np.ones(window) / window, mode="valid")


def training_curves(folder: Path) -> dict[str, np.ndarray]:
    """Smoothed training loss of every method, the mean over its seeds."""
    content = json.loads((folder / "compare.json").read_text(encoding="utf-8"))
    by_method: dict[str, list[np.ndarray]] = {}
    for key, result in content["cells"].items():
        if not key.endswith("search") and not result["diverged"]:
            curve = smooth(result["losses"], result["steps"])
            by_method.setdefault(result["method"], []).append(curve)
    return {name: np.mean(curves, axis=0) for name, curves in by_method.items()}


def effective_ranks(summary: dict[str, Row]) -> None:
    """Test prediction (a)."""
    print("(a) effective rank of B: at least 0.99 r, and less for lora\n")
    print("| method | rank | mean | minimum over layers |\n|---|---|---|---|")
    for name in ("lora", *STIEFEL):
        row = summary[name]
        mean, least = row["effective_rank_b"][0], row["least_effective_rank_b"]
        print(f"| `{name}` | {row['rank']} | {mean:.2f} | {least:.2f} |")
    full = all(
        summary[name]["least_effective_rank_b"] > 0.99 * summary[name]["rank"]
        for name in STIEFEL
    )
    drops = summary["lora"]["effective_rank_b"][0] < 0.99 * summary["lora"]["rank"]
    print(f"\n{verdict(full and drops)}\n")


def fixed_a(summary: dict[str, Row], projection: Path, random: Path) -> None:
    """Test prediction (b)."""
    print("(b) held-out loss: both trained < A projected < A random\n")
    print("| method | both trained | A projected | A random |\n|---|---|---|---|")
    cases = [summary, rows(projection), rows(random)]
    for name in ("stiefel", "lora"):
        losses = [case[name]["loss"] for case in cases]
        cells = " | ".join(f"{mean:.4f} ± {std:.4f}" for mean, std in losses)
        print(f"| `{name}` | {cells} |")
    losses = [case["stiefel"]["loss"][0] for case in cases]
    print(f"\nfor stiefel: {verdict(losses == sorted(losses))}\n")


def half_the_steps(summary: dict[str, Row], curves: dict[str, np.ndarray]) -> None:
    """Test prediction (c)."""
    print("(c) fraction of the steps to lora's final loss: at most 60 %\n")
    print("| method | held-out loss | training loss, first time |\n|---|---|---|")
    target = curves["lora"][-1]
    met = []
    for name in ("lora", *FASTER):
        share = summary[name]["share_of_steps"]
        below = np.flatnonzero(curves[name] <= target)
        first = (below[0] + 1) / len(curves[name]) if len(below) else None
        texts = ["not reached" if x is None else f"{x:.0%}" for x in (share, first)]
        print(f"| `{name}` | {' | '.join(texts)} |")
        if name in FASTER:
            met.append(share is not None and share <= 0.6)
    print(f"\n{verdict(all(met))}, for {sum(met)} of {len(met)} methods\n")


def verdict(holds: bool) -> str:
    """The verdict in a word."""
    return "confirmed" if holds else "refuted"


def draw(path: Path, summary: dict[str, Row], curves: dict[str, np.ndarray]) -> None:
    """Plot training losses, and the final effective ranks of B."""
    figure = Figure(figsize=(10, 4), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, curve in curves.items():
        line = "k--" if name == "lora" else "-"
        left.plot(np.arange(len(curve)), curve, line, linewidth=1.2, label=name)
    left.axhline(curves["lora"][-1], color="black", linestyle=":", linewidth=0.8)
    left.set(xlabel="step", ylabel="training loss, running mean", yscale="log")
    left.legend(fontsize="x-small")
    left.grid(alpha=0.3, which="both")
    names = list(summary)
    right.barh(names, [summary[name]["effective_rank_b"][0] for name in names])
    right.plot([summary[name]["least_effective_rank_b"] for name in names], names, "k|")
    right.set(xlabel="effective rank of B: mean, and minimum over layers")
    right.invert_yaxis()
    figure.savefig(path)


def main(
    comparison: tyro.conf.Positional[Path],
    random: Path | None = None,
    projection: Path | None = None,
    picture: Path = Path("predictions.png"),
) -> None:
    """Test the predictions on comparisons.

    Args:
        comparison: all methods, training both factors.
        random: lora and stiefel with A fixed at random.
        projection: lora and stiefel with A fixed at a projection of the weight.
        picture: output file of the plot.
    """
    summary, curves = rows(comparison), training_curves(comparison)
    effective_ranks(summary)
    if random is not None and projection is not None:
        fixed_a(summary, projection, random)
    half_the_steps(summary, curves)
    draw(picture, summary, curves)


if __name__ == "__main__":
    tyro.cli(main)
