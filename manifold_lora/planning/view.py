"""A plan as tables on the terminal."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from manifold_lora.console import PlainTable, print_table, print_text
from manifold_lora.planning.meshes import format_mesh
from manifold_lora.training.display import show_pairs


def show_plan(console: Console, plan: Mapping[str, Any]) -> None:
    """Print memory, operations, collectives and time of a step, per device."""
    show_pairs(console, "Plan", _settings(plan))
    show_pairs(console, "Memory per device", _memory(plan["memory"]))
    if not plan["fits"]:
        text = "The step does not fit. Changes that should help (estimates):"
        print_text(console, text, "red")
        for remedy in plan["remedies"] or ["a larger slice or a smaller model"]:
            print_text(console, f"  {remedy}")
        return
    step = {
        "floating-point operations": _decimal(plan["flops"]),
        "memory traffic": f"{_decimal(plan['hbm_bytes'])}B",
        "communication received": f"{_decimal(plan['collective_bytes'])}B",
        "compile time": f"{plan['compile_seconds']:.0f} s",
    }
    show_pairs(console, "Step per device", step)
    _collectives(console, plan["collectives"])
    if "seconds" in plan:
        show_pairs(console, "Time (roofline)", _time(plan))
    else:
        text = "No time estimate: the peak rates of CPU devices are unknown."
        print_text(console, text, "dim")


def _settings(plan: Mapping[str, Any]) -> dict[str, str]:
    price = plan["price"]
    cost = "" if price is None else f", ${price:g} per chip-hour"
    batch = f"{plan['batch_size']} rows of {plan['sequence_length']}"
    if plan["accumulate"] > 1:
        batch += f" in {plan['accumulate']} micro-batches"
    return {
        "model": f"{plan['model']}: {plan['parameters']:,} parameters, {plan['dtype']}"
        + (f", projections in {plan['base_dtype']}" if plan["base_dtype"] else "")
        + f", remat {plan['remat']}",
        "method": f"{plan['method']}, rank {plan['rank']}, {plan['trained']:,} trained",
        "devices": f"{plan['devices']} ({plan['topology'] or 'CPU'}{cost})",
        "mesh": format_mesh(plan["mesh"]),
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
    table = PlainTable("Collectives per step")
    for name in ("kind", "axes", "overlapped"):
        table.add_column(name)
    for name in ("calls", "received", "ms"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row["kind"],
            " × ".join(row["axes"]),
            "yes" if row["hidden"] else "no",
            f"{row['calls']:,}",
            f"{_decimal(row['bytes'])}B",
            f"{1e3 * row['seconds']:.2f}" if "seconds" in row else "",
        )
    print_table(console, table)


def _time(plan: Mapping[str, Any]) -> dict[str, str]:
    seconds, optimizer = plan["seconds"], plan["optimizer"]
    return {
        "computation": _ms(seconds["compute"]),
        "memory traffic": _ms(seconds["memory"]),
        "overlapped collectives": _ms(seconds["hidden"]),
        "exposed collectives": _ms(seconds["exposed"]),
        "step": f"{_ms(seconds['step'])}: the maximum of the first three plus exposed "
        "collectives; a lower bound, at peak rates",
        "optimiser": f"{_ms(optimizer['seconds']['step'])} "
        f"({optimizer['share']:.2%} of the step)",
        "throughput": f"{plan['tokens_per_second']:,.0f} tokens/s",
        "cost": f"${plan['dollars_per_billion_tokens']:,.2f} per billion tokens",
    }


def _decimal(number: float) -> str:
    """A number with a decimal prefix, as in "4.48 T".

    >>> _decimal(4.48e13), _decimal(12)
    ('44.80 T', '12.00 ')
    """
    for factor, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.2f} {unit}"
    return f"{number:.2f} "


def _binary(number: float) -> str:
    """Bytes with a binary prefix, as in "3.12 GiB"."""
    for factor, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if number >= factor:
            return f"{number / factor:.2f} {unit}"
    return f"{number:.0f} B"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f} ms"
