"""The report on an adapter as tables on the terminal and as pictures."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from manifold_lora.inspection.plots import plot_effective_rank, plot_gram, plot_spectra

GRAM, RANKS, SPECTRA = "gram.png", "effective_rank.png", "spectra.png"


def draw(
    out: Path,
    report: Mapping[str, Any],
    grams: Mapping[str, Mapping[str, np.ndarray]],
) -> tuple[str, ...]:
    """Write the three pictures into a directory and return their names.

    XᵀX is drawn of the factors that a constraint is on, and of B where none is.

    Args:
        out: where to write.
        report: of `inspection.measure`, with the path of the adapter.
        grams: XᵀX by module and factor.
    """
    modules = report["modules"]
    short = short_names(report["kinds"])
    rows: dict[str, dict[int, np.ndarray]] = {}
    ranks: dict[str, dict[str, dict[int, float]]] = {}
    spectra: dict[str, dict[str, dict[int, list[float]]]] = {}
    for name, module in modules.items():
        # A module outside the layers, such as lm_head, stands at the first.
        layer, kind = module["layer"] or 0, short[module["kind"]]
        for label, numbers in _labelled(module):
            of_kind = ranks.setdefault(label, {}).setdefault(kind, {})
            of_kind[layer] = numbers["effective_rank"]
            of_kind = spectra.setdefault(label, {}).setdefault(kind, {})
            of_kind[layer] = numbers["singular_values"]
        held = [k for k, x in module["factors"].items() if x["residual"] is not None]
        for key in held or ["b"]:
            label = f"{kind}  {key.upper()}ᵀ{key.upper()}"
            rows.setdefault(label, {})[layer] = grams[name][key]
    title = f"{report['method']}, {'/'.join(Path(report['adapter']).parts[-2:])}"
    plot_gram(out / GRAM, rows, f"Gram matrices: {title}")
    rank = max(module["rank"] for module in modules.values())
    plot_effective_rank(out / RANKS, ranks, rank, f"Effective rank: {title}")
    plot_spectra(out / SPECTRA, spectra, f"Singular values: {title}")
    return GRAM, RANKS, SPECTRA


def _labelled(module: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield "ΔW", module["delta_w"]
    for key, numbers in module["factors"].items():
        yield key.upper(), numbers


def short_names(kinds: Iterable[str]) -> dict[str, str]:
    """The last part of every name, or the whole names where that is not unique.

    >>> short_names(["self_attn.q_proj", "mlp.up_proj"])
    {'self_attn.q_proj': 'q_proj', 'mlp.up_proj': 'up_proj'}
    """
    last = {kind: kind.rpartition(".")[2] for kind in kinds}
    return last if len(set(last.values())) == len(last) else {k: k for k in last}


def show(console: Console, report: Mapping[str, Any]) -> None:
    """A table of ΔW and one of the factors: a row for each kind, and one for all."""
    short = short_names(report["kinds"])
    rows = [(short[kind], numbers) for kind, numbers in report["kinds"].items()]
    rows.append(("all", report["summary"]))
    layers = {module["layer"] for module in report["modules"].values()} - {None}
    console.print(
        f"{report['adapter']}: {report['method']}, modules: {len(report['modules'])}, "
        f"layers: {len(layers)}",
        markup=False,
        soft_wrap=True,
    )
    console.print(_update_table(rows))
    console.print(_factor_table(rows))
    lines = [
        "Means over layers; residual, cos max (of |cos|) and angle are the largest.",
        f"used: singular values above {report['used_threshold']:.0%} of the largest. "
        "cos: between columns.",
        "angle: between the column spaces at the start and now, in degrees"
        + ("." if report["start"] else "; unknown without start/."),
    ]
    if report["method"].endswith("dora"):
        lines.append("ΔW: the update of the direction, before its columns are scaled.")
    console.print("\n".join(lines), style="dim", markup=False)


def _update_table(rows: Iterable[tuple[str, Mapping[str, Any]]]) -> Table:
    table = _table("ΔW", "module", "rank", "used", "effective", "stable", "norm")
    table.add_column("largest\nweight", justify="right", no_wrap=True)
    table.add_column("at", no_wrap=True)
    for name, numbers in rows:
        update = numbers["delta_w"]
        weight = update["largest_weight"]
        table.add_row(
            escape(name),
            f"{numbers['rank']:.4g}",
            f"{update['rank_used']:.1f}",
            f"{update['effective_rank']:.2f}",
            f"{update['stable_rank']:.2f}",
            f"{update['norm']:#.3g}",
            f"{weight['value']:.2e}",
            escape(_place(weight)),
        )
    return table


def _place(weight: Mapping[str, Any]) -> str:
    layer = "" if weight["layer"] is None else f"layer {weight['layer']}, "
    return f"{layer}{weight['row']}, {weight['column']}"


def _factor_table(rows: Iterable[tuple[str, Mapping[str, Any]]]) -> Table:
    table = _table("Factors", "module", "", "used", "effective", "stable", "residual")
    for heading in ("cos\nmean", "cos\nstd", "cos\nmax", "angle"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, numbers in rows:
        for index, (key, factor) in enumerate(numbers["factors"].items()):
            table.add_row(
                escape(name) if index == 0 else "",
                escape(key.upper()),
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


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left", box=None)
    table.add_column(headings[0], no_wrap=True)
    for heading in headings[1:]:
        table.add_column(heading, justify="right")
    return table


def _or_dash(x: float | None, form: str) -> str:
    return "–" if x is None else format(x, form)
