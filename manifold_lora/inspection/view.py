"""The report on an adapter as tables on the terminal and as plots."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from manifold_lora.console import PlainTable, print_table, print_text
from manifold_lora.inspection.plots import plot_effective_rank, plot_gram, plot_spectra

GRAM, RANKS, SPECTRA = "gram.png", "effective_rank.png", "spectra.png"
_RANKS = ("num.\nrank", "eff.\nrank", "stable\nrank")  # headings; 80 columns hold them


def draw(
    out: Path,
    report: Mapping[str, Any],
    grams: Mapping[str, Mapping[str, np.ndarray]],
) -> tuple[str, ...]:
    """Write the three plots into a directory and return their file names.

    Args:
        out: output directory.
        report: from `measure`, with the path of the adapter.
        grams: XᵀX by module and factor, of the factors to draw.
    """
    modules = report["modules"]
    short = short_names(report["kinds"])
    rows: dict[str, dict[int, np.ndarray]] = {}
    ranks: dict[str, dict[str, dict[int, float]]] = {}
    spectra: dict[str, dict[str, dict[int, list[float]]]] = {}
    for name, module in modules.items():
        # A module outside the layers, such as lm_head, is drawn at layer 0.
        layer, kind = module["layer"] or 0, short[module["kind"]]
        for label, measures in _labelled(module):
            of_kind = ranks.setdefault(label, {}).setdefault(kind, {})
            of_kind[layer] = measures["effective_rank"]
            of_kind = spectra.setdefault(label, {}).setdefault(kind, {})
            of_kind[layer] = measures["singular_values"]
        for key, x in grams[name].items():
            label = f"{kind}  {key.upper()}ᵀ{key.upper()}"
            rows.setdefault(label, {})[layer] = x
    title = f"{report['method']}, {'/'.join(Path(report['adapter']).parts[-2:])}"
    plot_gram(out / GRAM, rows, f"Gram matrices: {title}")
    rank = max(module["rank"] for module in modules.values())
    plot_effective_rank(out / RANKS, ranks, rank, f"Effective rank: {title}")
    plot_spectra(out / SPECTRA, spectra, f"Singular values: {title}")
    return GRAM, RANKS, SPECTRA


def _labelled(module: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield "ΔW", module["delta_w"]
    for key, measures in module["factors"].items():
        yield key.upper(), measures


def short_names(kinds: Iterable[str]) -> dict[str, str]:
    """The last component of each name, or the full names if these are not unique.

    >>> short_names(["self_attn.q_proj", "mlp.up_proj"])
    {'self_attn.q_proj': 'q_proj', 'mlp.up_proj': 'up_proj'}
    """
    last = {kind: kind.rpartition(".")[2] for kind in kinds}
    return last if len(set(last.values())) == len(last) else {k: k for k in last}


def show(console: Console, report: Mapping[str, Any]) -> None:
    """Print a table of ΔW and one of the factors: one row per kind, and one for all."""
    short = short_names(report["kinds"])
    rows = [(short[kind], measures) for kind, measures in report["kinds"].items()]
    rows.append(("all", report["summary"]))
    layers = {module["layer"] for module in report["modules"].values()} - {None}
    print_text(
        console,
        f"{report['adapter']}: {report['method']}, {len(report['modules'])} modules in "
        f"{len(layers)} layers",
    )
    print_table(console, _update_table(rows))
    print_table(console, _factor_table(rows))
    lines = [
        "Means over layers; maxima of violation, cos max (of |cos|) and angle.",
        f"num. rank: singular values above {report['used_threshold']:.0%} of the "
        "largest; eff.: entropy effective rank.",
        "violation: of the manifold's constraint. cos: between columns.",
        "angle: of the column space from the initial one, in degrees"
        + ("." if report["start"] else "; not available without start/."),
    ]
    if report["method"].endswith("dora"):
        lines.append("ΔW: the update of the direction, before scaling by magnitudes.")
    print_text(console, "\n".join(lines), "dim")


def _update_table(rows: Iterable[tuple[str, Mapping[str, Any]]]) -> PlainTable:
    table = _table("ΔW", "module", "rank", *_RANKS, "norm")
    table.add_column("largest\nentry", justify="right")
    table.add_column("at")
    for name, measures in rows:
        update = measures["delta_w"]
        entry = update["largest_weight"]
        table.add_row(
            name,
            f"{measures['rank']:.4g}",
            f"{update['rank_used']:.1f}",
            f"{update['effective_rank']:.2f}",
            f"{update['stable_rank']:.2f}",
            f"{update['norm']:#.3g}",
            f"{entry['value']:.2e}",
            _location(entry),
        )
    return table


def _location(entry: Mapping[str, Any]) -> str:
    layer = "" if entry["layer"] is None else f"layer {entry['layer']}, "
    return f"{layer}{entry['row']}, {entry['column']}"


def _factor_table(rows: Iterable[tuple[str, Mapping[str, Any]]]) -> PlainTable:
    table = _table("Factors", "module", "", *_RANKS, "violation")
    for heading in ("cos\nmean", "cos\nstd", "cos\nmax", "angle"):
        table.add_column(heading, justify="right")
    for name, measures in rows:
        for index, (key, factor) in enumerate(measures["factors"].items()):
            table.add_row(
                name if index == 0 else "",
                key.upper(),
                f"{factor['rank_used']:.1f}",
                f"{factor['effective_rank']:.2f}",
                f"{factor['stable_rank']:.2f}",
                _or_dash(factor["residual"], ".0e"),
                _or_dash(factor["cosine_mean"], "z.3f"),
                _or_dash(factor["cosine_std"], ".3f"),
                _or_dash(factor["cosine_max"], ".3f"),
                _or_dash(factor["angle_largest"], ".1f"),
            )
    return table


def _table(title: str, *headings: str) -> PlainTable:
    table = PlainTable(title)
    table.add_column(headings[0])
    for heading in headings[1:]:
        table.add_column(heading, justify="right")
    return table


def _or_dash(x: float | None, spec: str) -> str:
    return "–" if x is None else format(x, spec)
