"""The papers' three predictions, held against comparisons that have been run.

    cd runs/studies && python ../../examples/studies/predictions.py default \
        --random fixed_a_random --projection fixed_a_projection

(a) the effective rank of B stays r for Stiefel methods and drops for AdamW; (b) both
factors trained are far better than A fixed at a projection of the weight, and that is
better than A fixed at random; (c) landing and Stiefel methods reach the final loss of
LoRA with AdamW in about half the steps. Prints each as a Markdown table with a verdict
by the rule that stands beside it, and draws the loss curves and the ranks.
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
    """The running mean over a fifteenth of the run, of whole windows only."""
    window = max(1, steps // 15)
    return np.convolve(losses, np.ones(window) / window, mode="valid")


def training_curves(folder: Path) -> dict[str, np.ndarray]:
    """Smoothed training loss of every method, the mean over its seeds."""
    content = json.loads((folder / "compare.json").read_text(encoding="utf-8"))
    found: dict[str, list[np.ndarray]] = {}
    for key, cell in content["cells"].items():
        if not key.endswith("search") and not cell["diverged"]:
            curve = smooth(cell["losses"], cell["steps"])
            found.setdefault(cell["method"], []).append(curve)
    return {name: np.mean(curves, axis=0) for name, curves in found.items()}


def effective_ranks(found: dict[str, Row]) -> None:
    """Prediction (a)."""
    print("(a) effective rank of B: within 1 % of r at least, and less for lora\n")
    print("| method | rank | mean | least of a layer |\n|---|---|---|---|")
    for name in ("lora", *STIEFEL):
        row = found[name]
        mean, least = row["effective_rank_b"][0], row["least_effective_rank_b"]
        print(f"| `{name}` | {row['rank']} | {mean:.2f} | {least:.2f} |")
    full = all(
        found[name]["least_effective_rank_b"] > 0.99 * found[name]["rank"]
        for name in STIEFEL
    )
    drops = found["lora"]["effective_rank_b"][0] < 0.99 * found["lora"]["rank"]
    print(f"\n{verdict(full and drops)}\n")


def fixed(found: dict[str, Row], projection: Path, random: Path) -> None:
    """Prediction (b)."""
    print("(b) held-out loss with both trained < A projected < A random\n")
    print("| method | both trained | A projected | A random |\n|---|---|---|---|")
    cases = [found, rows(projection), rows(random)]
    for name in ("stiefel", "lora"):
        pairs = [case[name]["loss"] for case in cases]
        shown = " | ".join(f"{mean:.4f} ± {spread:.4f}" for mean, spread in pairs)
        print(f"| `{name}` | {shown} |")
    losses = [case["stiefel"]["loss"][0] for case in cases]
    print(f"\nfor stiefel: {verdict(losses == sorted(losses))}\n")


def half_the_steps(found: dict[str, Row], curves: dict[str, np.ndarray]) -> None:
    """Prediction (c)."""
    print("(c) share of the steps until lora's final loss: at most 60 %\n")
    print("| method | held-out loss | training loss, first time |\n|---|---|---|")
    goal = curves["lora"][-1]
    met = []
    for name in ("lora", *FASTER):
        share = found[name]["share_of_steps"]
        below = np.flatnonzero(curves[name] <= goal)
        first = (below[0] + 1) / len(curves[name]) if len(below) else None
        texts = ["not reached" if x is None else f"{x:.0%}" for x in (share, first)]
        print(f"| `{name}` | {' | '.join(texts)} |")
        if name in FASTER:
            met.append(share is not None and share <= 0.6)
    print(f"\n{verdict(all(met))}, for {sum(met)} of {len(met)} methods\n")


def verdict(holds: bool) -> str:
    """The word for it."""
    return "confirmed" if holds else "refuted"


def draw(path: Path, found: dict[str, Row], curves: dict[str, np.ndarray]) -> None:
    """Training losses, and the effective ranks of B at the end."""
    figure = Figure(figsize=(10, 4), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, curve in curves.items():
        line = "k--" if name == "lora" else "-"
        left.plot(np.arange(len(curve)), curve, line, linewidth=1.2, label=name)
    left.axhline(curves["lora"][-1], color="black", linestyle=":", linewidth=0.8)
    left.set(xlabel="step", ylabel="training loss, running mean", yscale="log")
    left.legend(fontsize="x-small")
    left.grid(alpha=0.3, which="both")
    names = list(found)
    right.barh(names, [found[name]["effective_rank_b"][0] for name in names])
    right.plot([found[name]["least_effective_rank_b"] for name in names], names, "k|")
    right.set(xlabel="effective rank of B: mean, and least of a layer")
    right.invert_yaxis()
    figure.savefig(path)


def main(
    comparison: tyro.conf.Positional[Path],
    random: Path | None = None,
    projection: Path | None = None,
    picture: Path = Path("predictions.png"),
) -> None:
    """Hold the predictions against comparisons.

    Args:
        comparison: of all methods, both factors trained.
        random: of lora and stiefel with A fixed at random.
        projection: of lora and stiefel with A fixed at a projection of the weight.
        picture: where to draw.
    """
    found, curves = rows(comparison), training_curves(comparison)
    effective_ranks(found)
    if random is not None and projection is not None:
        fixed(found, projection, random)
    half_the_steps(found, curves)
    draw(picture, found, curves)


if __name__ == "__main__":
    tyro.cli(main)
