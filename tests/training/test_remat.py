"""The automatic choice of a rematerialisation policy by the program's own figures."""

import io
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from manifold_lora.models.remat import Remat, candidates
from manifold_lora.training import memory, remat
from manifold_lora.training.memory import device_memory, program_memory
from manifold_lora.training.remat import first_fitting
from manifold_lora.training.train import train
from tests.configs import train_config
from tests.tiny import data_file, model_directory
from tests.tolerances import LOGITS

# Numbers that a program with each policy sorts, and therefore keeps in memory.
KEPT: dict[str, int] = {"none": 2**22, "dots": 2**20, "block": 2**10}


class Steps:
    """Programs that return how much they keep, and a count of their compilations."""

    def __init__(self, fails: str = ""):
        self.traced: list[str] = []
        self._fails = fails

    def __call__(self, policy: Remat) -> Any:
        @jax.jit
        def step(x: jax.Array) -> tuple[jax.Array, jax.Array]:
            self.traced.append(policy)
            if self._fails and policy == "none":
                raise jax.errors.JaxRuntimeError(self._fails)
            kept = jnp.sort(x * jnp.arange(KEPT[policy]))
            return kept.max(), kept.sum()

        return step


def chosen(monkeypatch: pytest.MonkeyPatch, available: int | None, steps: Steps):
    """What the step returns twice, and what was shown."""
    monkeypatch.setattr(remat, "device_memory", lambda: available)
    console = Console(file=io.StringIO(), width=200)
    step = first_fitting(steps, candidates("auto", "gpu"), console)
    largest = [int(step(jnp.float32(1))[0]) + 1 for _ in range(2)]
    assert largest[0] == largest[1]
    names = [name for name, count in KEPT.items() if count == largest[0]]
    return names[0], console.file.getvalue()  # pyright: ignore


@pytest.mark.parametrize(
    ("available", "policy"),
    [(None, "none"), (2**30, "none"), (2**25, "dots"), (2**13, "block"), (1, "block")],
)
def test_the_first_policy_that_fits_is_taken_and_compiled_once(
    monkeypatch, available, policy
):
    steps = Steps()
    assert chosen(monkeypatch, available, steps)[0] == policy
    order = list(KEPT)
    assert steps.traced == order[: order.index(policy) + 1]


def test_what_is_shown(monkeypatch):
    _, shown = chosen(monkeypatch, 2**30, Steps())
    assert "remat none: a step needs 0.0" in shown and "GiB of 1.0" in shown
    assert chosen(monkeypatch, 1, Steps())[1] == "remat block\n"


def test_a_compiler_out_of_memory_means_the_next_policy(monkeypatch):
    fails = Steps("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm.")
    assert chosen(monkeypatch, None, fails)[0] == "dots"
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        chosen(monkeypatch, None, Steps("INTERNAL: something else"))


def test_a_given_policy_is_not_compiled_to_look_at_it():
    steps = Steps()
    first_fitting(steps, candidates("dots", "gpu"), Console(quiet=True))
    assert steps.traced == []


def test_the_memory_of_a_program_is_that_of_its_arrays():
    x = jnp.ones((64, 64))
    compiled = jax.jit(lambda x: x @ x).lower(x).compile()
    assert program_memory(compiled) == 2 * x.nbytes
    donated = jax.jit(lambda x: x + 1, donate_argnums=0).lower(x).compile()
    assert program_memory(donated) == x.nbytes


def test_the_memory_of_a_cpu_device_is_its_part_of_the_container(monkeypatch, tmp_path):
    assert device_memory() > 2**26  # pyright: ignore
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(memory, "_LIMIT_OF_CONTAINER", limit)
    limit.write_text("max\n")
    of_machine = device_memory()
    limit.write_text(f"{2**30}\n")
    assert device_memory() == 2**30 // jax.local_device_count()
    assert of_machine > 2**30 // jax.local_device_count()  # pyright: ignore


@pytest.mark.parametrize("policy", ["dots", "block"])
def test_a_run_says_what_it_chose_and_learns_the_same(
    monkeypatch, tmp_path, policy, quick_compilation
):
    if policy == "block":
        monkeypatch.setattr(remat, "device_memory", lambda: 1)
    settings = {
        "model": model_directory(tmp_path / "model"),
        "data": data_file(tmp_path / "train.jsonl"),
        "rank": 4,
        "targets": ("q_proj", "down_proj"),
        "steps": 3,
        "batch_size": 8,
        "eval_every": 0,
    }

    def run(name: str, **changes: Any) -> tuple[str, list[float]]:
        console = Console(file=io.StringIO(), width=200)
        out = tmp_path / name
        train(train_config(out=out, **settings, **changes), console)
        rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
        return console.file.getvalue(), [row["loss"] for row in rows]  # pyright: ignore

    shown, losses = run("auto")
    assert f"remat {policy}" in shown
    shown, same = run("none", remat="none")
    assert "remat" not in shown and len(losses) == 3
    np.testing.assert_allclose(losses, same, rtol=LOGITS)
