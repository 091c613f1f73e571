"""The loss curve of a run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from manifold_lora.checkpoints.atomic import atomic_file


def plot_loss(path: Path, rows: Sequence[dict[str, Any]], title: str) -> None:
    """Training loss, its running mean and the held-out loss over steps, as a PNG.

    Args:
        path: where to write.
        rows: of metrics.jsonl: those with `loss`, and those with `eval_loss`.
        title: of the picture.
    """
    from matplotlib.figure import Figure

    train = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    held_out = [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row]
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    if train:
        steps, losses = np.array(train).T
        window = max(1, len(losses) // 50)
        mean = np.convolve(losses, np.ones(window) / window, mode="valid")
        axes.plot(steps, losses, color="C0", alpha=0.25, linewidth=1)
        axes.plot(steps[window - 1 :], mean, color="C0", label="training")
    if held_out:
        axes.plot(*np.array(held_out).T, "o-", color="C1", label="held out")
    axes.set(xlabel="step", ylabel="loss per answer token", title=title, yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    with atomic_file(path) as partial:
        figure.savefig(partial)
