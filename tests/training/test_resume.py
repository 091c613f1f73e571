"""Interrupted runs resume, and end like uninterrupted ones."""

import io
import itertools
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tomli_w
from rich.console import Console
from safetensors.numpy import load_file

from manifold_lora.checkpoints.store import CheckpointError
from manifold_lora.configuration.flat import flatten
from manifold_lora.errors import InputError
from manifold_lora.training import train as training
from tests import command
from tests.configs import train_config
from tests.tiny import data_file, model_directory
from tests.tolerances import FLOAT32

Settings = dict[str, Any]
pytestmark = pytest.mark.usefixtures("quick_compilation")
SETTINGS: Settings = {
    "rank": 4,
    "targets": ("q_proj", "down_proj"),
    "steps": 8,
    "batch_size": 8,
    "eval_every": 3,
    "checkpoint_every": 2,
    "learning_rate": 2e-2,
    "warmup_steps": 1,
}
ADAPTER = "adapter/adapter_model.safetensors"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    model, data = folder / "model", folder / "train.jsonl"
    return {"model": model_directory(model), "data": data_file(data)}


@pytest.fixture
def settings(files: dict[str, Path], tmp_path: Path) -> Settings:
    return {**files, **SETTINGS, "out": tmp_path / "run", "remat": "none"}


def run(settings: Settings) -> tuple[dict[str, Any], str]:
    text, config = io.StringIO(), train_config(**settings)
    return training.train(config, Console(file=text, width=300)), text.getvalue()


def elsewhere(settings: Settings) -> Settings:
    """The same run, uninterrupted, in a directory beside."""
    return settings | {"out": settings["out"].with_name("uninterrupted")}


def without_costs(summary: dict[str, Any]) -> dict[str, Any]:
    return {**summary, "seconds": 0, "peak_memory_bytes": 0}


@pytest.fixture
def uninterrupted(files: dict[str, Path]) -> Settings:
    """The settings of a run to its end, which the first of these tests makes."""
    out = files["model"].with_name("uninterrupted")
    settings = {**files, **SETTINGS, "out": out, "remat": "none"}
    run(settings)
    return settings


def same_outcome(settings: Settings, uninterrupted: Settings) -> None:
    """The run ended as one that was never interrupted, to the last bit."""
    one, other = settings["out"], uninterrupted["out"]
    summaries = [json.loads((x / "summary.json").read_text()) for x in (one, other)]
    assert without_costs(summaries[0]) == without_costs(summaries[1])
    assert (one / ADAPTER).read_bytes() == (other / ADAPTER).read_bytes()
    assert (one / "start" / Path(ADAPTER).name).read_bytes() != (
        one / ADAPTER
    ).read_bytes()

    def rows(out: Path) -> list[dict[str, Any]]:
        lines = (out / "metrics.jsonl").read_text().splitlines()
        costs = {"tokens_per_second": 0, "peak_memory_bytes": 0}
        return [{**json.loads(x), **costs} for x in lines]

    assert rows(one) == rows(other)


class Interrupted(Exception):
    pass


def interrupt(monkeypatch: pytest.MonkeyPatch, step: int, how: Any) -> None:
    """Call `how` after that many steps of the next run, and of no later one."""
    make_step = training.make_step

    def made(*arguments: Any) -> Any:
        monkeypatch.setattr(training, "make_step", make_step)
        real, calls = make_step(*arguments), itertools.count(1)

        def taken(*arguments: Any) -> Any:
            result = real(*arguments)
            if next(calls) == step:
                how()
            return result

        return taken

    monkeypatch.setattr(training, "make_step", made)


def fail() -> None:
    raise Interrupted


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "stiefel", "dropout": 0.1, "packing": True, "sequence_length": 40},
        pytest.param(
            {"method": "loram_fr", "packing": True, "sequence_length": 40},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"method": "dora", "dropout": 0.1, "accumulate": 2}, marks=pytest.mark.slow
        ),
    ],
    ids=lambda changes: changes["method"],
)
def test_an_interrupted_run_resumes_bit_for_bit(settings, monkeypatch, changes):
    settings = settings | changes
    interrupt(monkeypatch, 6, fail)
    with pytest.raises(Interrupted):
        run(settings)
    assert not (settings["out"] / "summary.json").exists()
    summary, text = run(settings)
    assert "Resuming from the checkpoint of step 4." in text
    assert summary["steps"] == 8
    run(elsewhere(settings))
    same_outcome(settings, elsewhere(settings))


@pytest.mark.smoke
def test_sigterm_writes_a_checkpoint_and_the_run_resumes(
    settings, uninterrupted, monkeypatch
):
    interrupt(monkeypatch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(training.Preempted, match="checkpoints/5 is written"):
        run(settings)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    _, text = run(settings)
    assert "Resuming from the checkpoint of step 5." in text
    same_outcome(settings, uninterrupted)


@pytest.mark.slow
def test_patience_survives_an_interruption(settings, monkeypatch):
    # nothing is better than the first evaluation
    settings = settings | {"best_metric": "accuracy", "patience": 1, "eval_every": 2}
    settings = settings | {"learning_rate": 1e-9, "free_learning_rate": 1e-9}
    interrupt(monkeypatch, 3, fail)
    with pytest.raises(Interrupted):
        run(settings)
    summary, _ = run(settings)
    assert (summary["steps"], summary["best_step"]) == (4, 2)


def test_a_finished_run_says_so_and_changes_nothing(settings):
    run(settings)
    before = {p: p.stat().st_mtime_ns for p in settings["out"].rglob("*")}
    checkpoints = sorted(p.name for p in (settings["out"] / "checkpoints").iterdir())
    assert checkpoints == ["6", "8"]  # the last two, one of them the best
    summary, text = run(settings)
    assert "This run is finished" in text
    assert summary == json.loads((settings["out"] / "summary.json").read_text())
    assert {p: p.stat().st_mtime_ns for p in settings["out"].rglob("*")} == before


def test_overwrite_restarts(settings, uninterrupted, monkeypatch):
    interrupt(monkeypatch, 6, fail)
    with pytest.raises(Interrupted):
        run(settings)
    _, text = run(settings | {"overwrite": True})
    assert "Resuming" not in text
    same_outcome(settings, uninterrupted)


def interrupted(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Path:
    interrupt(monkeypatch, 7, fail)
    with pytest.raises(Interrupted):
        run(settings)
    checkpoints = settings["out"] / "checkpoints"
    # the last two, and what was best at step 4
    assert sorted(p.name for p in checkpoints.iterdir()) == ["3", "4", "6"]
    return checkpoints


def flip(directory: Path) -> str:
    """One bit of the largest file."""
    file = max(directory.rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    return str(file.relative_to(directory))


def test_a_corrupt_checkpoint_is_named_and_skipped(
    settings, uninterrupted, monkeypatch
):
    checkpoints = interrupted(settings, monkeypatch)
    name = flip(checkpoints / "6")
    _, text = run(settings)
    assert f"{checkpoints / '6'}: {name} was changed" in text
    assert "Resuming from the checkpoint of step 4." in text
    same_outcome(settings, uninterrupted)


def test_no_intact_checkpoint(settings, monkeypatch):
    checkpoints = interrupted(settings, monkeypatch)
    flip(checkpoints / "6")
    (checkpoints / "4" / "run.json").unlink()
    (checkpoints / "3" / "run.json").write_text("{}")
    with pytest.raises(InputError, match=r"4: run.json is missing(.|\n)*--overwrite"):
        run(settings)


@pytest.mark.slow
def test_a_lost_best_adapter_is_replaced(settings, monkeypatch):
    # the best stays that of step 2, then the rate makes it worse
    settings = settings | {
        "learning_rate": 5.0,
        "eval_every": 2,
        "keep_checkpoints": 1,
        "schedule": "constant",
    }
    interrupt(monkeypatch, 7, fail)
    with pytest.raises(Interrupted):
        run(settings)
    best = json.loads((settings["out"] / "checkpoints/6/run.json").read_text())
    step = best["best_step"]
    if step in (0, 6):
        pytest.fail(f"the best is of step {step}: this test needs another rate")
    flip(settings["out"] / "checkpoints" / str(step))
    _, text = run(settings)
    assert "The best adapter is lost" in text


@pytest.mark.parametrize("errors", ["stop", "continue"])
def test_a_checkpoint_that_cannot_be_written(settings, errors):
    settings = settings | {"checkpoint_errors": errors}
    settings["out"].mkdir()
    (settings["out"] / "config.toml").write_text(
        tomli_w.dumps(flatten(train_config(**settings)))
    )
    shutil.copy(__file__, settings["out"] / "checkpoints")  # no directory
    if errors == "stop":
        with pytest.raises(CheckpointError, match="checkpoints/2 cannot be written"):
            run(settings)
        return
    summary, text = run(settings)
    assert "Continuing without it" in text
    assert summary["steps"] == 8


def test_another_base_is_refused(settings, files, monkeypatch, tmp_path):
    shutil.copytree(files["model"], tmp_path / "model")
    settings = settings | {"model": tmp_path / "model"}
    interrupted(settings, monkeypatch)
    shutil.rmtree(tmp_path / "model")
    model_directory(tmp_path / "model", seed=1)
    with pytest.raises(InputError, match="another run: base: found .*, needed"):
        run(settings)


@pytest.mark.slow
@pytest.mark.mesh
def test_a_run_resumes_on_another_mesh(settings, monkeypatch):
    first = settings | {"method": "stella", "mesh": "fsdp=8"}
    interrupt(monkeypatch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(training.Preempted):
        run(first)
    second = first | {"mesh": "data=2,fsdp=2,tensor=2"}
    summary, text = run(second)
    assert "step 5" in text and "2 tensor" in text
    uninterrupted, _ = run(elsewhere(first))
    assert summary["loss_after"] == pytest.approx(
        uninterrupted["loss_after"], abs=FLOAT32
    )
    one, other = (load_file(c["out"] / ADAPTER) for c in (settings, elsewhere(first)))
    for name, x in one.items():
        np.testing.assert_allclose(x, other[name], atol=10 * FLOAT32)
    assert jax.device_count() == 8


@pytest.mark.mesh
@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ("fsdp=4", "the product of the sizes must be 8"),
        ("fsdp=2,tensor=4", "does not divide num_key_value_heads 2: .* 1, 2"),
        ("model=8", "unknown axis 'model'"),
    ],
)
def test_meshes_that_do_not_fit(settings, mesh, message):
    with pytest.raises(InputError, match=message):
        run(settings | {"mesh": mesh})
    assert not settings["out"].exists()


@pytest.mark.slow
@pytest.mark.timeout(600)  # five starts of the command
def test_kill_at_any_moment(settings, files):
    """Three times, at random moments, and then to the end."""
    rng = random.Random(0)
    options = {**files, **SETTINGS, "steps": 24, "out": settings["out"]}
    arguments = ["train", *command.flags(options)]
    metrics = settings["out"] / "metrics.jsonl"

    def lines() -> int:
        return len(metrics.read_text().splitlines()) if metrics.exists() else 0

    for _ in range(3):
        process, before = command.start(*arguments), lines()
        target = before + rng.randrange(1, 7)
        command.wait(lambda n=target: lines() >= n)
        time.sleep(rng.random() / 20)
        process.send_signal(signal.SIGKILL)
        code, output = command.end(process)
        assert code == -signal.SIGKILL, output
    code, output = command.end(command.start(*arguments))
    assert code == 0, output
    uninterrupted = settings["out"].with_name("uninterrupted")
    options["out"] = uninterrupted
    code, output = command.end(command.start("train", *command.flags(options)))
    assert code == 0, output
    assert (settings["out"] / ADAPTER).read_bytes() == (
        uninterrupted / ADAPTER
    ).read_bytes()
