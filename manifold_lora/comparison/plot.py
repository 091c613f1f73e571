"""The loss curves of a comparison."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from manifold_lora.checkpoints.atomic import atomic_file


def plot_comparison(
    path: Path, curves: Mapping[str, np.ndarray], baseline: str
) -> None:
    """Held-out loss over steps of several methods, as a PNG.

    Lines are means over runs, bands their ranges. The baseline is dashed, and a dotted
    line marks its final loss.

    Args:
        path: output file.
        curves: steps and losses by method, (evaluations, 1 + runs), in the order of
            the legend, which shows the final losses.
        baseline: the method to compare with.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import AutoLocator, NullLocator

    figure = Figure(figsize=(9, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for number, (name, curve) in enumerate(curves.items()):
        steps, losses = curve[:, 0], curve[:, 1:]
        mean = losses.mean(1)
        line, colour = ("--", "black") if name == baseline else ("-", f"C{number}")
        label = f"{mean[-1]:.4f}  {name}"
        axes.plot(steps, mean, line, color=colour, linewidth=1.6, label=label)
        axes.fill_between(
            steps, losses.min(1), losses.max(1), color=colour, alpha=0.08, linewidth=0
        )
    if baseline in curves:
        axes.axhline(
            curves[baseline][-1, 1:].mean(), color="black", linestyle=":", linewidth=0.8
        )
    # Early losses are large and similar; they would compress the rest of the axis.
    late = [curve[len(curve) // 6 :, 1:].mean(1) for curve in curves.values()]
    low = min(map(np.min, late), default=0)
    high = max(map(np.max, late), default=0)
    axes.set(xlabel="step", ylabel="held-out loss per answer token", yscale="log")
    if 0 < low < high:
        axes.set_ylim(low * (low / high) ** 0.05, high * (high / low) ** 0.05)
        if high < 10 * low:  # less than a decade has hardly any logarithmic tick
            axes.yaxis.set_major_locator(AutoLocator())
            axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3, which="both")
    if curves:
        axes.legend(title="final loss", loc="upper left", bbox_to_anchor=(1, 1))
    with atomic_file(path) as partial:
        figure.savefig(partial)
