"""The run directory: who holds it, what it is, and what is never lost."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.numpy import load_file, save_file

from manifold_lora.errors import InputError
from manifold_lora.training import train as training
from manifold_lora.training.directory import RunDirectory, read_summary
from manifold_lora.training.run import _rows_until
from tests.cases import slow_but
from tests.configs import train_config
from tests.tiny import data_file, model_directory

Settings = dict[str, Any]
pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return {
        "model": model_directory(tmp_path / "model"),
        "data": data_file(tmp_path / "train.jsonl"),
        "out": tmp_path / "run",
        "method": "lora",
        "rank": 2,
        "targets": "q_proj",
        "steps": 2,
        "batch_size": 4,
        "remat": "none",
    }


def run(settings: Settings, **changes: Any) -> tuple[dict[str, Any], str]:
    text, config = io.StringIO(), train_config(**settings | changes)
    summary = training.train(config, Console(file=text, width=300))
    return summary, text.getvalue()


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file()
    }


def test_one_process_at_a_time(settings):
    code = (
        "import sys, time; from filelock import FileLock; "
        "lock = FileLock(sys.argv[1] + '/.lock'); lock.acquire(); "
        "open(sys.argv[1] + '/.owner', 'w').write('77'); print(1, flush=True); "
        "time.sleep(60)"
    )
    settings["out"].mkdir()
    command = [sys.executable, "-c", code, str(settings["out"])]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(InputError, match=r"going on in .*run/ \(process 77\)"):
            run(settings)
        holder.kill()  # which frees it
    with RunDirectory(train_config(**settings)):
        pass


@pytest.mark.slow
def test_other_data_or_another_base_is_another_run(settings):
    run(settings)
    data_file(settings["data"], 41)
    with pytest.raises(InputError, match="examples of --data changed since the run"):
        run(settings)
    data_file(settings["data"])
    summary, text = run(settings)
    assert "finished" in text
    file = settings["model"] / "model.safetensors"
    weights = load_file(file)
    (name,) = [name for name in weights if "layers.1.mlp.up_proj" in name]
    weights[name] = weights[name] * 2
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match="weights of --model changed since the run"):
        run(settings)
    again, _ = run(settings, overwrite=True)
    assert again["identity"]["base"] != summary["identity"]["base"]


@pytest.mark.slow
def test_a_finished_run_goes_further_with_more_steps(settings):
    run(settings)
    with pytest.raises(InputError, match="steps was 2, is 1"):
        run(settings, steps=1)
    summary, text = run(settings, steps=4, report=("tensorboard",))
    assert "Resuming from the checkpoint of step 2." in text
    assert (summary["steps"], summary["planned_steps"]) == (4, 4)
    rows = (settings["out"] / "metrics.jsonl").read_text().splitlines()
    steps = [row["step"] for row in map(json.loads, rows) if "loss" in row]
    assert steps == [1, 2, 3, 4]
    assert "finished" in run(settings, steps=4)[1]


@pytest.mark.parametrize(
    ("change", "reason"),
    slow_but(
        [({"targets": "q_porj"}, "q_porj")],
        [
            ({"targets": "q_porj"}, "q_porj"),
            ({"report": ("wandb",)}, "wandb"),
            ({"optimizer": "lbfgs", "method": "stiefel"}, "--optimizer lbfgs"),
            ({"data": Path("absent.jsonl")}, "absent.jsonl"),
        ],
    ),
)
def test_a_bad_command_removes_nothing(settings, change, reason, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    run(settings)
    before = files(settings["out"])
    with pytest.raises(InputError, match=reason):
        run(settings, overwrite=True, **change)
    assert files(settings["out"]) == before


def test_a_run_that_takes_no_step_removes_nothing(settings, monkeypatch):
    run(settings)
    before = files(settings["out"])

    def failing(*arguments: Any) -> Any:
        def step(*arguments: Any) -> Any:
            raise KeyboardInterrupt

        return step

    with monkeypatch.context() as patch:
        patch.setattr(training, "make_step", failing)
        with pytest.raises(KeyboardInterrupt):
            run(settings, overwrite=True, rank=1)
    assert files(settings["out"]) == before


@pytest.mark.parametrize("moved", ["all", "some"])
def test_a_run_that_was_moved_aside_comes_back(settings, moved):
    """After the process was killed before, or while, the old run was moved."""
    run(settings)
    before = files(settings["out"])
    aside = settings["out"] / ".previous"
    aside.mkdir()
    for path in list(settings["out"].glob("[!.]*")):
        if moved == "all" or path.name in ("config.toml", "summary.json"):
            shutil.move(path, aside)
    if moved == "all":
        (aside / "complete").touch()
        (settings["out"] / "config.toml").write_text("rank = 7")  # of the new run
    assert "finished" in run(settings)[1]
    assert files(settings["out"]) == before


def test_overwrite_removes_all_of_the_old_run_and_nothing_else(settings):
    run(settings)
    out = settings["out"]
    (out / "inspect").mkdir()
    for stray in (".DS_Store", "notes/me.txt", "checkpoints/.DS_Store"):
        (out / stray).parent.mkdir(exist_ok=True)
        (out / stray).write_text("mine")
    summary, _ = run(settings, overwrite=True, steps=1)
    assert summary["steps"] == 1 and not (out / "inspect").exists()
    assert (out / "notes/me.txt").read_text() == "mine"
    assert (out / ".DS_Store").exists() and not (out / ".previous").exists()


def test_strays_do_not_end_a_run(settings):
    out = settings["out"]
    strays = [out / ".DS_Store", out / "mine" / "notes.txt"]
    for stray in strays:
        stray.parent.mkdir(parents=True, exist_ok=True)
        stray.write_text("mine")
    run(settings)
    strays += [out / folder / ".DS_Store" for folder in ("adapter", "last")]
    strays += [out / "checkpoints" / "mine" / ".DS_Store"]
    for stray in strays:
        stray.parent.mkdir(parents=True, exist_ok=True)
        stray.write_text("mine")
    run(settings, steps=4)
    assert [stray.read_text() for stray in strays] == ["mine"] * 5


def test_files_of_the_user_in_an_adapter_are_not_replaced(settings):
    run(settings)
    notes = settings["out"] / "adapter" / "notes.txt"
    notes.write_text("mine")
    for changes in ({"steps": 4}, {"overwrite": True}):
        with pytest.raises(InputError, match=r"adapter holds .* \(notes.txt\)"):
            run(settings, **changes)
    assert notes.read_text() == "mine"


def test_adapters_inside_of_runs_and_runs_inside_of_adapters(settings):
    run(settings)
    adapter = settings["out"] / "adapter"
    with pytest.raises(InputError, match="inside of --out"):
        run(settings, adapter=adapter, overwrite=True)
    with pytest.raises(InputError, match="inside of the adapter"):
        run(settings, out=adapter / "run")
    assert (adapter / "adapter_model.safetensors").is_file()


def test_the_last_adapter_may_be_the_result(settings):
    run(settings, keep="last", steps=3, eval_every=1, learning_rate=1.0)
    out = settings["out"]
    name = "adapter_model.safetensors"
    assert (out / "last" / name).read_bytes() == (out / "adapter" / name).read_bytes()
    summary = read_summary(out)
    assert summary is not None and summary["best_step"] == 3
    rows = (out / "metrics.jsonl").read_text().splitlines()
    losses = [r["eval_loss"] for r in map(json.loads, rows) if "eval_loss" in r]
    assert summary["loss_after"] == losses[-1]


def test_a_run_without_evaluation(settings):
    summary, text = run(settings, eval_every=0)
    assert summary["loss_after"] is summary["loss_before"] is None
    assert (settings["out"] / "adapter" / "adapter_config.json").is_file()
    assert "eval_loss" not in (settings["out"] / "metrics.jsonl").read_text()
    assert "held-out loss" not in text


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"[1]", b"\x00\xff", b'{"steps": "2"}', b"[" * 100000),
        b'{"steps": 2}',
        b'{"steps": 2, "loss_after": "x"}',
        b'{"steps": 2, "loss_after": 1.5, "planned_steps": [2]}',
        b'{"steps": 2, "loss_after": null, "identity": {}, "planned_steps": null}',
    ],
)
def test_a_damaged_summary_is_of_an_unfinished_run(settings, content):
    settings["out"].mkdir()
    (settings["out"] / "summary.json").write_bytes(content)
    assert read_summary(settings["out"]) is None


def test_damaged_rows_are_skipped(tmp_path):
    file = tmp_path / "metrics.jsonl"
    good = {"step": 1, "loss": 0.5}
    lines = [
        "",
        "{",
        "[1]",
        '{"loss": 1}',
        '{"step": "1"}',
        '{"step": true}',
        "[" * 9999,
    ]
    text = "\n".join([*lines, json.dumps(good), '{"step": 2, "loss": NaN'])
    file.write_bytes(text.encode() + b"\xff\n")
    assert _rows_until(file, 5) == [good]


def test_a_path_too_long_for_checkpoints_is_refused_at_once(settings, tmp_path):
    out = tmp_path.joinpath(*["x" * 200] * 19, "y" * 150)
    with pytest.raises(InputError, match=r"path of \d+ bytes.* at most 3800"):
        with RunDirectory(train_config(**settings | {"out": str(out)})):
            pass
    assert not (tmp_path / ("x" * 200)).exists()
