"""Plots of the factors of an adapter."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from manifold_lora.checkpoints.atomic import atomic_file

T = TypeVar("T")
_MAX_PANELS = 8  # rows or columns of a plot that remain readable


def plot_gram(
    path: Path, rows: Mapping[str, Mapping[int, np.ndarray]], title: str
) -> None:
    """Heat maps of XᵀX, one row per factor and one column per layer, as a PNG.

    Each is divided by the mean of its diagonal, so that all share one colour scale:
    orthonormal columns give the identity, and unit-norm columns are not rescaled. At
    most 16 rows and 8 layers are drawn, evenly spaced.

    Args:
        path: output file.
        rows: XᵀX, (r, r), by label and layer; ranks may differ.
        title: of the figure.

    References:
        Figure 3 of "Manifold-LoRA", which draws BᵀB on the Stiefel and the oblique
        manifold.
    """
    names = spread(list(rows), 2 * _MAX_PANELS)
    layers = spread(sorted({layer for row in rows.values() for layer in row}))
    figure = _figure(1.6 + 0.95 * len(layers), 0.9 + 0.95 * len(names))
    grid = figure.subplots(len(names), len(layers), squeeze=False)
    image = None
    for axes_row, name in zip(grid, names, strict=True):
        ranks = {len(x) for x in rows[name].values()}
        for axes, layer in zip(axes_row, layers, strict=True):
            axes.set(xticks=[], yticks=[])
            if layer not in rows[name]:
                axes.axis("off")
                continue
            x = rows[name][layer]
            size = np.diag(x).mean()
            image = axes.imshow(
                x / (size if size > 0 else 1), cmap="RdBu_r", vmin=-1, vmax=1
            )
            if len(ranks) > 1:
                axes.set_xlabel(f"r = {len(x)}", fontsize=7)
        axes_row[0].axis("on")
        axes_row[0].set_ylabel(name, rotation=0, ha="right", va="center")
    for axes, layer in zip(grid[0], layers, strict=True):
        axes.set_title(f"layer {layer}", fontsize=9)
    assert image is not None
    figure.colorbar(image, ax=grid, shrink=min(1, 3 / len(names)), extend="both")
    figure.suptitle(
        f"{_escape_dollars(title)}\neach divided by the mean of its diagonal"
    )
    with atomic_file(path) as partial:
        figure.savefig(partial)


def plot_effective_rank(
    path: Path,
    panels: Mapping[str, Mapping[str, Mapping[int, float]]],
    rank: int,
    title: str,
) -> None:
    """Effective rank over layers, one panel per matrix, one line per kind, as a PNG.

    Args:
        path: output file.
        panels: entropy effective rank by matrix ("ΔW", "B"), kind of module and layer.
        rank: the largest rank of a module, drawn as a dotted line.
        title: of the figure.

    References:
        Figure 3 of "Riemannian optimization for LoRA on the Stiefel manifold", 2025,
        arXiv:2508.17901.
    """
    from matplotlib.ticker import MaxNLocator

    figure = _figure(1.8 + 3 * len(panels), 3.6)
    grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, (matrix, kinds) in zip(grid, panels.items(), strict=True):
        axes.axhline(rank, color="black", linestyle=":", linewidth=1, label="rank")
        # Lines at full rank coincide, so later ones are thinner.
        for index, (kind, values) in enumerate(kinds.items()):
            width = 1.2 + 2.4 * (1 - (index + 1) / len(kinds))
            axes.plot(
                *zip(*sorted(values.items()), strict=True),
                "o-",
                label=kind,
                linewidth=width,
                markersize=2.2 * width,
            )
        axes.set(xlabel="layer", title=matrix)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    # With a fixed correction, ΔW may have up to twice the rank of its factors.
    values = [
        x for row in panels.values() for kind in row.values() for x in kind.values()
    ]
    grid[0].set(ylabel="effective rank", ylim=(0, 1.06 * max(rank, *values)))
    handles = grid[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside right center", frameon=False)
    figure.suptitle(_escape_dollars(title))
    with atomic_file(path) as partial:
        figure.savefig(partial)


def plot_spectra(
    path: Path,
    panels: Mapping[str, Mapping[str, Mapping[int, Sequence[float]]]],
    title: str,
) -> None:
    """Singular values: rows are matrices, columns kinds, lines layers, as a PNG.

    Values below float32 rounding are omitted. At most 8 kinds are drawn, evenly spaced.

    Args:
        path: output file.
        panels: singular values by matrix ("ΔW", "B"), kind of module and layer.
        title: of the figure.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.ticker import MaxNLocator

    kinds = spread(list(next(iter(panels.values()))))
    layers = {n for row in panels.values() for kind in row.values() for n in kind}
    norm = Normalize(min(layers), max(layers) + (len(layers) == 1))
    colours = colormaps["viridis"]
    figure = _figure(1.8 + 1.7 * len(kinds), 0.8 + 1.7 * len(panels))
    grid = figure.subplots(
        len(panels), len(kinds), squeeze=False, sharex="col", sharey="row"
    )
    for axes_row, (matrix, row) in zip(grid, panels.items(), strict=True):
        drawn: list[float] = []
        for axes, kind in zip(axes_row, kinds, strict=True):
            for layer, values in row.get(kind, {}).items():
                sigma = np.asarray(values)
                sigma = sigma[sigma > np.finfo(np.float32).eps * sigma[0]]
                index = np.arange(1, len(sigma) + 1)
                axes.plot(index, sigma, ".-", color=colours(norm(layer)), linewidth=1)
                drawn.extend(sigma)
            axes.grid(alpha=0.3, which="both")
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes_row[0].set_ylabel(f"σ of {matrix}" if drawn else f"{matrix} is 0")
        if not drawn:
            axes_row[0].set_yticks([])
        else:
            # At least half a decade, so that a flat spectrum does not look like noise.
            top, bottom = max(drawn), min(drawn)
            bottom = 10 ** np.floor(np.log10(min(bottom, top / 3)))
            axes_row[0].set(yscale="log", ylim=(0.8 * bottom, 1.5 * top))
    for axes, kind in zip(grid[0], kinds, strict=True):
        axes.set_title(kind, fontsize=9)
    figure.supxlabel("index", fontsize=9)
    if len(layers) > 1:
        scale = ScalarMappable(norm, colours)
        ticks = MaxNLocator(8, integer=True)
        figure.colorbar(scale, ax=grid, label="layer", ticks=ticks)
    figure.suptitle(_escape_dollars(title))
    with atomic_file(path) as partial:
        figure.savefig(partial)


def spread(items: Sequence[T], limit: int = _MAX_PANELS) -> list[T]:
    """All items, or `limit` evenly spaced ones, including the first and the last.

    >>> spread(range(32))
    [0, 4, 9, 13, 18, 22, 27, 31]
    """
    if len(items) <= limit:
        return list(items)
    return [items[round(i * (len(items) - 1) / (limit - 1))] for i in range(limit)]


def _figure(width: float, height: float) -> Any:
    """A figure without a display backend; sizes in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(max(width, 5), height), dpi=120, layout="constrained")


def _escape_dollars(text: str) -> str:
    """Escape $, which Matplotlib would read as maths, for example in a path."""
    return text.replace("$", r"\$")
