"""Pictures of an adapter."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")
_AT_MOST = 8  # rows or columns of a picture that can still be read


def plot_gram(
    path: Path, rows: Mapping[str, Mapping[int, np.ndarray]], title: str
) -> None:
    """Heat maps of XᵀX, a row for each factor and a column for each layer, as a PNG.

    Each is divided by the mean of its diagonal, so that one scale serves factors of
    any size: orthonormal columns give the identity, and columns of length 1 are
    drawn as they are. At most 16 rows and 8 layers, spread evenly.

    Args:
        path: where to write.
        rows: XᵀX, (r, r), by label and layer; ranks may differ.
        title: of the picture.

    References:
        Figure 3 of "Manifold-LoRA", which draws BᵀB on the Stiefel and the oblique
        manifold.
    """
    names = spread(list(rows), 2 * _AT_MOST)
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
    figure.suptitle(f"{_plain(title)}\neach divided by the mean of its diagonal")
    figure.savefig(path)


def plot_effective_rank(
    path: Path,
    panels: Mapping[str, Mapping[str, Mapping[int, float]]],
    rank: int,
    title: str,
) -> None:
    """Entropy effective rank over layers, a panel a matrix, a line a kind, as a PNG.

    Args:
        path: where to write.
        panels: effective rank by matrix ("ΔW", "B"), kind of module and layer.
        rank: of the adapter's largest module, drawn as a dotted line.
        title: of the picture.

    References:
        Figure 3 of "Riemannian optimization for LoRA on the Stiefel manifold", 2025,
        arXiv:2508.17901.
    """
    from matplotlib.ticker import MaxNLocator

    figure = _figure(1.8 + 3 * len(panels), 3.6)
    grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, (matrix, kinds) in zip(grid, panels.items(), strict=True):
        axes.axhline(rank, color="black", linestyle=":", linewidth=1, label="rank")
        # Lines at full rank lie on each other: the later ones are thinner.
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
    # ΔW less a fixed correction may have up to twice the rank of its factors.
    values = [
        x for row in panels.values() for kind in row.values() for x in kind.values()
    ]
    grid[0].set(ylabel="effective rank", ylim=(0, 1.06 * max(rank, *values)))
    handles = grid[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside right center", frameon=False)
    figure.suptitle(_plain(title))
    figure.savefig(path)


def plot_spectra(
    path: Path,
    panels: Mapping[str, Mapping[str, Mapping[int, Sequence[float]]]],
    title: str,
) -> None:
    """Singular values, a row a matrix, a column a kind, a line a layer, as a PNG.

    Values below the rounding of float32 are left out. At most 8 kinds, spread evenly.

    Args:
        path: where to write.
        panels: singular values by matrix ("ΔW", "B"), kind of module and layer.
        title: of the picture.
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
            # Half a decade at least, or a flat spectrum would be drawn as noise.
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
    figure.suptitle(_plain(title))
    figure.savefig(path)


def spread(items: Sequence[T], most: int = _AT_MOST) -> list[T]:
    """All items, or `most` of them from the first to the last, spread evenly.

    >>> spread(range(32))
    [0, 4, 9, 13, 18, 22, 27, 31]
    """
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _figure(width: float, height: float) -> Any:
    """A figure that needs no screen, in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(max(width, 5), height), dpi=120, layout="constrained")


def _plain(text: str) -> str:
    """Text that is not read as mathematics, as a path with two $ would be."""
    return text.replace("$", r"\$")
