"""Whole runs on a tiny model: what they write, keep, show and refuse."""

import datetime
import io
import itertools
import json
import re
import sys
import tomllib
import types

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from safetensors import SafetensorError

import manifold_lora as ml
from manifold_lora.checkpoints import atomic
from manifold_lora.configuration.flat import flatten
from manifold_lora.training import train as training
from tests.configs import train_config
from tests.tiny import data_file, model_directory
from tests.tolerances import EFFECTIVE_RANK, RESIDUAL


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return model_directory(folder / "model"), data_file(folder / "train.jsonl")


def settings_of(files, folder):
    model, data = files
    return {
        "model": model,
        "data": data,
        "out": folder / "run",
        "rank": 4,
        "targets": ("q_proj", "down_proj"),
        "steps": 12,
        "batch_size": 8,
        "eval_every": 4,
        "learning_rate": 0.2,
        "free_learning_rate": 2e-2,
        "warmup_steps": 2,
        "remat": "none",
    }


@pytest.fixture
def settings(files, tmp_path):
    return settings_of(files, tmp_path)


@pytest.fixture(scope="module")
def finished(files, tmp_path_factory):
    """The settings, the summary and the output of a run that no test changes."""
    settings = settings_of(files, tmp_path_factory.mktemp("finished"))
    return settings, *run(settings)


def run(settings, **changes):
    """The summary and the output of a run; a change to None is a setting left out."""
    changed = {k: v for k, v in {**settings, **changes}.items() if v is not None}
    console = Console(file=io.StringIO(), width=200)
    summary = training.train(train_config(**changed), console)
    return summary, console.file.getvalue()  # pyright: ignore


def rows(settings):
    lines = (settings["out"] / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.smoke
def test_a_run(finished):
    settings, summary, shown = finished
    out = settings["out"]
    assert sorted(p.name for p in out.iterdir()) == [
        ".lock",
        "adapter",
        "checkpoints",
        "config.toml",
        "last",
        "loss.png",
        "metrics.jsonl",
        "start",
        "summary.json",
    ]
    assert json.loads((out / "summary.json").read_text()) == summary
    saved = tomllib.loads((out / "config.toml").read_text())
    assert saved.pop("date") == datetime.date.today().isoformat()
    assert saved == flatten(train_config(**settings))
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    steps = [row for row in rows(settings) if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 13))
    keys = {
        "loss",
        "learning_rate",
        "grad_norm",
        "tokens_per_second",
        "step",
    }
    assert set(steps[0]) == keys
    measured = [row["step"] for row in steps if "residual" in row]
    assert measured == [4, 8, 10, 12]  # every ten steps, and at evaluations
    evaluations = [row for row in rows(settings) if "eval_loss" in row]
    assert [row["step"] for row in evaluations] == [0, 4, 8, 12]
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert summary["loss_before"] == evaluations[0]["eval_loss"]
    assert summary["loss_after"] == min(row["eval_loss"] for row in evaluations)
    assert summary["largest_residual"] == max(row.get("residual", 0) for row in steps)
    assert summary["better_than_start"] and summary["best_step"] > 0
    assert all(row["peak_memory_bytes"] > 1e7 for row in evaluations[1:])
    assert summary["largest_residual"] < RESIDUAL
    assert abs(summary["least_effective_rank"] - 4) < EFFECTIVE_RANK
    # two layers of q_proj (32 → 32) and down_proj (48 → 32), rank 4
    assert summary["trainable_parameters"] == 2 * 4 * (32 + 32 + 48 + 32)
    assert summary["majority"] == 0.5 and summary["accuracy_before"] == 0
    words = ["Plan", "tokens per step", "Held-out examples", "predicted", "truth"]
    words += [
        "1,152 (",
        "constraint violation",
        "step 12/12",
        "tokens/s",
        "adapter",
    ]
    assert [word for word in words if word not in shown] == []


def test_the_adapter_is_the_best_one_and_gives_the_reported_loss(finished):
    settings, summary, _ = finished
    model = ml.load_llama(settings["model"])
    ml.load_adapter(model, settings["out"] / "adapter")
    assert ml.manifold_tree(model)["layers"]["mlp"]["down_proj"]["b"] == ml.Stiefel(
        "qr"
    )
    # the first step of another run from this adapter starts where this one ended
    from manifold_lora.adapters import axes, split
    from manifold_lora.data.batches import evaluation_batches
    from manifold_lora.data.tokens import load_tokenizer
    from manifold_lora.evaluation.heldout import make_evaluate
    from manifold_lora.training.data import load_data

    data = load_data(train_config(**settings), load_tokenizer(settings["model"]))
    rebuild, factors, frozen = split(model)
    feed = evaluation_batches(data.held_out, batch_size=4, sequence_length=16)
    evaluation = make_evaluate(rebuild, axes(model))(factors, frozen, feed)
    assert evaluation.loss == pytest.approx(summary["loss_after"], rel=1e-5)
    assert evaluation.accuracy == summary["accuracy_after"]


@pytest.mark.slow
def test_same_seed_same_run_and_other_seed_another(settings, tmp_path):
    losses = []
    for name, seed in [("a", 0), ("b", 0), ("c", 1)]:
        changed = {"out": tmp_path / name, "seed": seed, "dropout": 0.1}
        run(settings, **changed)
        changed = {**settings, **changed}
        losses.append([row["loss"] for row in rows(changed) if "loss" in row])
    assert losses[0] == losses[1] != losses[2]


def test_plain_lora_packed_with_accumulation(settings):
    summary, shown = run(
        settings,
        method="lora",
        learning_rate=2e-2,
        free_learning_rate=None,
        packing=True,
        sequence_length=32,
        batch_size=4,
        accumulate=2,
        schedule="cosine",
        optimizer="lion",
    )
    assert summary["loss_after"] < summary["loss_before"]
    assert 1 <= summary["least_effective_rank"] <= 4
    assert "4 rows of 32 in 2 micro-batches, packed" in shown


def test_epochs_count_every_example(settings):
    # 40 records, 4 held out: 36 examples, 2 epochs of them in batches of 8
    summary, _ = run(settings, steps=None, epochs=2)
    assert summary["steps"] == 9


def test_finished_run_is_not_run_again(finished):
    settings, summary, _ = finished
    stamp = (settings["out"] / "metrics.jsonl").stat().st_mtime_ns
    again, shown = run(settings)
    assert again == summary and "finished" in shown and str(settings["out"]) in shown
    assert (settings["out"] / "metrics.jsonl").stat().st_mtime_ns == stamp


@pytest.mark.slow
def test_another_configuration_needs_overwrite(settings):
    run(settings)
    with pytest.raises(ml.InputError, match="rank was 4, is 2.*--overwrite"):
        run(settings, rank=2, alpha=8.0)
    summary, _ = run(settings, rank=2, alpha=8.0, overwrite=True)
    assert summary["trainable_parameters"] == 2 * 2 * (32 + 32 + 48 + 32)


def test_directory_of_something_else_is_left_alone(settings):
    settings["out"].mkdir()
    (settings["out"] / "thesis.tex").write_text("precious")
    with pytest.raises(ml.InputError, match="does not hold a run"):
        run(settings)
    assert [p.name for p in settings["out"].iterdir()] == ["thesis.tex"]


def test_early_stopping(settings):
    summary, shown = run(settings, learning_rate=1e-9, free_learning_rate=1e-9,
                         best_metric="accuracy", patience=1)  # fmt: skip
    assert summary["steps"] == 8 and summary["best_step"] == 4
    assert "No improvement for 1 evaluations" in shown
    assert summary["better_than_start"] is False
    assert "no evaluation was better than the start" in shown


def test_nan_stops_the_run_and_keeps_the_best_adapter(settings, monkeypatch):
    make_step = training.make_step

    def poisoned(*args):
        step, calls = make_step(*args), itertools.count(1)

        def wrapped(state, frozen, batch):
            state, metrics = step(state, frozen, batch)
            if next(calls) == 6:
                metrics["loss"] = jnp.asarray(jnp.nan)
            return state, metrics

        return wrapped

    monkeypatch.setattr(training, "make_step", poisoned)
    with pytest.raises(training.Diverged, match="step 6 .*nan.* step 4"):
        run(settings)
    model = ml.load_llama(settings["model"])
    ml.load_adapter(model, settings["out"] / "adapter")
    b = ml.factors(model)["layers"]["mlp"]["down_proj"]["b"]
    assert np.isfinite(b).all()
    assert not (settings["out"] / "summary.json").exists()


def test_full_disk_leaves_the_earlier_adapter(settings, monkeypatch):
    save, calls = atomic.save_file, []

    def full(*args, **kwargs):
        calls.append(args)
        if len(calls) > 2:  # start/ and the first adapter are intact
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        return save(*args, **kwargs)

    monkeypatch.setattr(atomic, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        run(settings)
    ml.load_adapter(ml.load_llama(settings["model"]), settings["out"] / "adapter")
    assert not [p for p in settings["out"].iterdir() if "partial" in p.name]


def test_show_batch_prints_and_stops(settings):
    summary, shown = run(settings, show_batch=True)
    assert summary == {} and "yes" in shown and not settings["out"].exists()


def test_tensorboard(settings):
    run(settings, steps=2, report=("tensorboard",))
    (events,) = settings["out"].glob("events.out.tfevents*")
    assert b"grad_norm" in events.read_bytes()


def test_wandb_gets_every_row(settings, monkeypatch):
    rows, ended = [], []
    fake = types.SimpleNamespace(
        log=lambda row, step: rows.append((step, row)),
        finish=lambda: ended.append(True),
    )
    module = types.SimpleNamespace(init=lambda **_: fake)
    monkeypatch.setitem(sys.modules, "wandb", module)
    run(settings, steps=2, eval_every=2, report=("wandb",))
    assert [step for step, _ in rows] == [0, 1, 2, 2] and ended == [True]
    assert rows[1][1]["loss"] > 0


def test_a_missing_extra_is_named(settings, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ml.InputError, match=r"manifold-lora\[wandb\]"):
        run(settings, report=("wandb",))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "stifel"}, "Did you mean stiefel"),
        ({"targets": ("q_porj",)}, "Did you mean q_proj"),
        ({"rank": 33}, "rank 33 does not fit"),
        ({"sequence_length": 3}, "longer than the sequence length"),
        ({"optimizer": "adamm"}, "Did you mean adam"),
    ],
)
def test_bad_input_before_anything_is_written(settings, changes, message):
    with pytest.raises(ml.InputError, match=message):
        run(settings, **changes)
    assert not settings["out"].exists()


def test_truncated_examples_are_counted(settings):
    # of 40 records the 15 from number 10 on that end in "yes" have 8 tokens
    _, shown = run(settings, sequence_length=7, steps=1)
    cut = re.findall(r"(\d+) examples truncated to 7 tokens \(longest 8\)", shown)
    assert sum(map(int, cut)) == 15


def test_one_record_cannot_be_split(settings, tmp_path):
    with pytest.raises(ml.InputError, match="--eval-data"):
        run(settings, data=data_file(tmp_path / "one.jsonl", 1))
