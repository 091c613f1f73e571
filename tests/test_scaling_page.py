"""The commands of docs/scaling.md are commands that there are."""

import shlex
from pathlib import Path

import pytest
import tyro

from manifold_lora.planning.config import PlanConfig, resolve_plan
from manifold_lora.training.config import TrainConfig, resolve

PAGE = Path(__file__).parent.parent / "docs" / "scaling.md"


def commands(name):
    lines = PAGE.read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    found = [line.strip().removeprefix("$ ") for line in lines]
    return [line for line in found if line.startswith(f"manifold-lora {name} ")]


@pytest.mark.parametrize("line", commands("plan"))
def test_plans(line):
    resolve_plan(tyro.cli(PlanConfig, args=shlex.split(line)[2:]))


@pytest.mark.parametrize("line", commands("train"))
def test_runs(line):
    resolve(tyro.cli(TrainConfig, args=shlex.split(line)[2:]))
