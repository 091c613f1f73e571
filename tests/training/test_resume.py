"""Interrupted runs go on, and end as if nothing had happened."""

import dataclasses
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
from rich.console import Console
from safetensors.numpy import load_file

from manifold_lora.checkpoints.resume import CheckpointError
from manifold_lora.errors import InputError
from manifold_lora.training import loop
from manifold_lora.training.config import TrainConfig
from tests import command
from tests.tiny import data_file, model_directory
from tests.tolerances import FLOAT32

pytestmark = pytest.mark.usefixtures("quick_compilation")
SETTINGS: dict[str, Any] = {
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
def config(files: dict[str, Path], tmp_path: Path) -> TrainConfig:
    return TrainConfig(**files, **SETTINGS, out=tmp_path / "run", remat=False)


def run(config: TrainConfig) -> tuple[dict[str, Any], str]:
    text = io.StringIO()
    return loop.train(config, Console(file=text, width=300)), text.getvalue()


def elsewhere(config: TrainConfig) -> TrainConfig:
    """The same run, uninterrupted, in a directory beside."""
    return dataclasses.replace(config, out=config.run_directory.with_name("whole"))


def same_outcome(config: TrainConfig, summary: dict[str, Any]) -> None:
    """The run ended as one that was never interrupted, to the last bit."""
    whole, _ = run(elsewhere(config))
    assert {**summary, "seconds": 0} == {**whole, "seconds": 0}
    one, other = config.run_directory, elsewhere(config).run_directory
    assert (one / ADAPTER).read_bytes() == (other / ADAPTER).read_bytes()
    assert (one / "start" / Path(ADAPTER).name).read_bytes() != (
        one / ADAPTER
    ).read_bytes()

    def rows(out: Path) -> list[dict[str, Any]]:
        lines = (out / "metrics.jsonl").read_text().splitlines()
        return [{**json.loads(x), "tokens_per_second": 0} for x in lines]

    assert rows(one) == rows(other)


class Interrupted(Exception):
    pass


def interrupt(monkeypatch: pytest.MonkeyPatch, step: int, how: Any) -> None:
    """Call `how` after that many steps of the next run, and of no later one."""
    make_step = loop.make_step

    def made(*arguments: Any) -> Any:
        monkeypatch.setattr(loop, "make_step", make_step)
        real, calls = make_step(*arguments), itertools.count(1)

        def taken(*arguments: Any) -> Any:
            result = real(*arguments)
            if next(calls) == step:
                how()
            return result

        return taken

    monkeypatch.setattr(loop, "make_step", made)


def fail() -> None:
    raise Interrupted


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "stiefel"},
        {"method": "loram_fr", "packing": True, "sequence_length": 40},
        {"method": "dora", "dropout": 0.1, "accumulate": 2},
    ],
    ids=lambda changes: changes["method"],
)
def test_an_interrupted_run_goes_on_bit_for_bit(config, monkeypatch, changes):
    config = dataclasses.replace(config, **changes)
    interrupt(monkeypatch, 6, fail)
    with pytest.raises(Interrupted):
        run(config)
    assert not (config.out / "summary.json").exists()
    summary, text = run(config)
    assert "Going on from the checkpoint of step 4." in text
    assert summary["steps"] == 8
    same_outcome(config, summary)


def test_sigterm_writes_a_checkpoint_and_the_run_goes_on(config, monkeypatch):
    interrupt(monkeypatch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(loop.Preempted, match="checkpoints/5 is written"):
        run(config)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    summary, text = run(config)
    assert "Going on from the checkpoint of step 5." in text
    same_outcome(config, summary)


def test_patience_is_kept_over_an_interruption(config, monkeypatch):
    # no answer is right before the end
    config = dataclasses.replace(
        config, best_metric="accuracy", patience=2, eval_every=2
    )
    interrupt(monkeypatch, 3, fail)
    with pytest.raises(Interrupted):
        run(config)
    summary, _ = run(config)
    assert (summary["steps"], summary["best_step"]) == (4, 0)


def test_a_finished_run_says_so_and_changes_nothing(config):
    run(config)
    before = {p: p.stat().st_mtime_ns for p in config.out.rglob("*")}
    kept = sorted(p.name for p in (config.out / "checkpoints").iterdir())
    assert kept == ["6", "8"]  # the last two, one of them the best
    summary, text = run(config)
    assert "This run is finished" in text
    assert summary == json.loads((config.out / "summary.json").read_text())
    assert {p: p.stat().st_mtime_ns for p in config.out.rglob("*")} == before


def test_overwrite_begins_anew(config, monkeypatch):
    interrupt(monkeypatch, 6, fail)
    with pytest.raises(Interrupted):
        run(config)
    summary, text = run(dataclasses.replace(config, overwrite=True))
    assert "Going on" not in text
    same_outcome(config, summary)


def interrupted(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> Path:
    interrupt(monkeypatch, 7, fail)
    with pytest.raises(Interrupted):
        run(config)
    checkpoints = config.run_directory / "checkpoints"
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


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(config, monkeypatch):
    checkpoints = interrupted(config, monkeypatch)
    name = flip(checkpoints / "6")
    summary, text = run(config)
    assert f"{checkpoints / '6'}: {name} was changed" in text
    assert "Going on from the checkpoint of step 4." in text
    same_outcome(config, summary)


def test_no_whole_checkpoint_left(config, monkeypatch):
    checkpoints = interrupted(config, monkeypatch)
    flip(checkpoints / "6")
    (checkpoints / "4" / "run.json").unlink()
    (checkpoints / "3" / "run.json").write_text("{}")
    with pytest.raises(InputError, match=r"4: run.json is missing(.|\n)*--overwrite"):
        run(config)


def test_a_lost_best_adapter_is_replaced(config, monkeypatch):
    # the best stays that of step 2, then the rate makes it worse
    config = dataclasses.replace(
        config, learning_rate=5.0, eval_every=2, keep_checkpoints=1, schedule="constant"
    )
    interrupt(monkeypatch, 7, fail)
    with pytest.raises(Interrupted):
        run(config)
    best = json.loads((config.out / "checkpoints/6/run.json").read_text())
    step = best["best_step"]
    if step in (0, 6):
        pytest.fail(f"the best is of step {step}: this test needs another rate")
    flip(config.out / "checkpoints" / str(step))
    _, text = run(config)
    assert "The best adapter is lost" in text


@pytest.mark.parametrize("errors", ["stop", "continue"])
def test_a_checkpoint_that_cannot_be_written(config, errors):
    config = dataclasses.replace(config, checkpoint_errors=errors)
    config.run_directory.mkdir()
    shutil.copy(__file__, config.run_directory / "checkpoints")  # no directory
    config = dataclasses.replace(config, overwrite=True)
    if errors == "stop":
        with pytest.raises(CheckpointError, match="checkpoints/2 cannot be written"):
            run(config)
        return
    summary, text = run(config)
    assert "Going on without it" in text
    assert summary["steps"] == 8


def test_another_base_is_refused(config, files, monkeypatch, tmp_path):
    shutil.copytree(files["model"], tmp_path / "model")
    config = dataclasses.replace(config, model=tmp_path / "model")
    interrupted(config, monkeypatch)
    shutil.rmtree(tmp_path / "model")
    model_directory(tmp_path / "model", seed=1)
    with pytest.raises(InputError, match="another run: base: found .*, needed"):
        run(config)


@pytest.mark.mesh
def test_a_run_goes_on_on_another_mesh(config, monkeypatch):
    first = dataclasses.replace(config, method="stella", mesh="fsdp=8")
    interrupt(monkeypatch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(loop.Preempted):
        run(first)
    second = dataclasses.replace(first, mesh="data=2,fsdp=2,tensor=2")
    summary, text = run(second)
    assert "step 5" in text and "2 tensor" in text
    whole, _ = run(elsewhere(first))
    assert summary["loss_after"] == pytest.approx(whole["loss_after"], abs=FLOAT32)
    one, other = (
        load_file(c.run_directory / ADAPTER) for c in (config, elsewhere(first))
    )
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
def test_meshes_that_do_not_fit(config, mesh, message):
    with pytest.raises(InputError, match=message):
        run(dataclasses.replace(config, mesh=mesh))
    assert not config.run_directory.exists()


def test_kill_at_any_moment(config, files):
    """Three times, at random moments, and then to the end."""
    rng = random.Random(0)
    options = {**files, **SETTINGS, "steps": 24, "out": config.run_directory}
    arguments = ["train", *command.flags(options)]
    metrics = config.run_directory / "metrics.jsonl"

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
    whole = config.run_directory.with_name("whole")
    options["out"] = whole
    code, output = command.end(command.start("train", *command.flags(options)))
    assert code == 0, output
    assert (config.run_directory / ADAPTER).read_bytes() == (
        whole / ADAPTER
    ).read_bytes()
