"""The plans printed in docs/scaling.md agree with those of their commands.

Compiling them takes minutes each; counts and bytes follow from shapes alone.
"""

import re
import shlex
from pathlib import Path
from typing import Any

import jax
import pytest
import tyro
from jax.sharding import AbstractMesh, AxisType

from manifold_lora.adapters import factors
from manifold_lora.cli.flags import flags_class, read_flags
from manifold_lora.distributed.mesh import AXES, read_mesh
from manifold_lora.models.shapes import model_shape, parameter_count
from manifold_lora.planning.abstract import (
    abstract_model,
    abstract_run,
    bytes_per_device,
)
from manifold_lora.planning.config import PlanConfig, resolve_plan

PAGE = Path(__file__).parent.parent / "docs" / "scaling.md"
UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def printed_plans():
    """Each plan command of the page, and the text printed below it."""
    text = PAGE.read_text(encoding="utf-8").replace("\\\n", " ")
    pattern = r"^    manifold-lora (plan .*)\n\n((?:    .*\n)+)"
    return re.findall(pattern, text, re.MULTILINE)


PLANS = printed_plans()


def number(pattern, printed):
    """The number that a line of a printed plan has in place of N."""
    match = re.search(pattern.replace("N", r"\$?([\d,.]+)"), printed)
    assert match, f"no {pattern!r} in {printed}"
    return float(match[1].replace(",", ""))


def test_the_page_has_plans():
    assert len(PLANS) == 5


@pytest.mark.parametrize("command, printed", PLANS)
def test_counts_and_bytes(command, printed):
    flags = tyro.cli(
        flags_class(PlanConfig),
        args=shlex.split(command)[1:],
        config=(tyro.conf.OmitArgPrefixes,),
    )
    run = resolve_plan(read_flags(PlanConfig, flags)).run
    sizes = read_mesh(re.findall(r" mesh +(\S+)", printed)[0])
    assert run.model.path is not None and sizes is not None
    model = abstract_model(run, model_shape(run.model.path))
    mesh: Any = AbstractMesh(
        tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES)
    )
    planned = abstract_run(run, model, mesh)
    assert number("N parameters", printed) == parameter_count(model.config)
    trained = sum(x.size for x in jax.tree.leaves(factors(model)))
    assert number("N trained", printed) == trained
    for name, tree in (
        ("base", planned.frozen),
        ("factors", planned.state.factors),
        ("optimiser", planned.state.opt_state),
        ("batch", planned.batch),
    ):
        ((size, unit),) = re.findall(rf" {name} +([\d.]+) ([KMG]iB)", printed)
        assert size == f"{bytes_per_device(tree) / UNITS[unit]:.2f}", name


@pytest.mark.parametrize(
    "command, printed", [plan for plan in PLANS if "does not fit" not in plan[1]]
)
def test_rates_follow_from_the_step_time(command, printed):
    step = number(r"step +N ms", printed) / 1000
    tokens = number("N rows of", printed) * number("rows of N", printed)
    rate = number("throughput +N tokens/s", printed)
    assert rate == pytest.approx(tokens / step, rel=1e-4)
    chips = number("devices +N ", printed) * number("N per chip-hour", printed)
    cost = number("cost +N per billion tokens", printed)
    assert cost == pytest.approx(chips / 3600 * 1e9 / rate, rel=1e-3)
