"""How a plan is shown."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from manifold_lora.planning.meshes import written
from manifold_lora.training.display import show_pairs


def show_plan(console: Console, plan: Mapping[str, Any]) -> None:
    """Memory, work, collectives and time of a step on each device."""
    show_pairs(console, "Plan", _heading(plan))
    show_pairs(console, "Memory of each device", _memory(plan["memory"]))
    if not plan["fits"]:
        console.print("It does not fit. What should help, by estimate:", style="red")
        for remedy in plan["remedies"] or ["a larger slice, or a smaller model"]:
            console.print(f"  {remedy}", markup=False, soft_wrap=True)
        return
    work = {
        "floating-point operations": _large(plan["flops"]),
        "memory traffic": f"{_large(plan['hbm_bytes'])}B",
        "received from others": f"{_large(plan['collective_bytes'])}B",
        "compiled in": f"{plan['compile_seconds']:.0f} s",
    }
    show_pairs(console, "Step of each device", work)
    _collectives(console, plan["collectives"])
    if "seconds" in plan:
        show_pairs(console, "Time by the roofline", _time(plan))
    else:
        console.print("CPU devices have no stated peaks: no time.", style="dim")


def _heading(plan: Mapping[str, Any]) -> dict[str, str]:
    price = plan["price"]
    cost = "" if price is None else f", ${price:g} a chip-hour"
    batch = f"{plan['batch_size']} rows of {plan['sequence_length']}"
    batch += f" in {plan['accumulate']} parts" if plan["accumulate"] > 1 else ""
    return {
        "model": f"{plan['model']}: {plan['parameters']:,} parameters, {plan['dtype']}"
        + (", layers recomputed" if plan["remat"] else ", layers kept"),
        "method": f"{plan['method']}, rank {plan['rank']}, {plan['trained']:,} trained",
        "devices": f"{plan['devices']} ({plan['topology'] or 'CPU'}{cost})",
        "mesh": written(plan["mesh"]),
        "batch": batch,
    }


def _memory(memory: Mapping[str, Any]) -> dict[str, str]:
    names = {
        "base": "base",
        "factors": "factors",
        "optimizer": "optimiser",
        "batch": "batch",
        "activations": "activations",
        "program": "program",
    }
    rows = {
        shown: _binary(memory[name]) for name, shown in names.items() if name in memory
    }
    limit = memory["available"]
    of = "" if limit is None else f" of {_binary(limit)} ({memory['peak'] / limit:.0%})"
    return rows | {"peak": _binary(memory["peak"]) + of}


def _collectives(console: Console, rows: list[dict[str, Any]]) -> None:
    if not rows:
        return
    table = Table(title="Collectives of a step", title_justify="left", box=None)
    for name in ("kind", "over", "while"):
        table.add_column(name)
    for name in ("times", "received", "ms"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row["kind"],
            " × ".join(row["axes"]),
            "computing" if row["hidden"] else "waiting",
            f"{row['calls']:,}",
            f"{_large(row['bytes'])}B",
            f"{1e3 * row['seconds']:.2f}" if "seconds" in row else "",
        )
    console.print(table)


def _time(plan: Mapping[str, Any]) -> dict[str, str]:
    took, optimizer = plan["seconds"], plan["optimizer"]
    return {
        "computing": _ms(took["compute"]),
        "memory traffic": _ms(took["memory"]),
        "collectives beside it": _ms(took["hidden"]),
        "collectives that it waits for": _ms(took["exposed"]),
        "step": f"{_ms(took['step'])}: the longest of the first three, and the fourth; "
        "at peak rates, so at least that",
        "of it the optimiser": f"{_ms(optimizer['seconds']['step'])} "
        f"({optimizer['share']:.2%})",
        "tokens": f"{plan['tokens_per_second']:,.0f} a second",
        "cost": f"${plan['dollars_per_billion_tokens']:,.2f} for a billion tokens",
    }


def _large(number: float) -> str:
    """With a decimal prefix, as in "4.48 T".

    >>> _large(4.48e13), _large(12)
    ('44.80 T', '12.00 ')
    """
    for factor, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.2f} {unit}"
    return f"{number:.2f} "


def _binary(number: float) -> str:
    """Bytes, as in "3.12 GiB"."""
    for factor, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if number >= factor:
            return f"{number / factor:.2f} {unit}"
    return f"{number:.0f} B"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f} ms"
