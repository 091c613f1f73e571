"""Whole runs: continuing from an adapter, merging, and exporting."""

import io
import itertools
import json
import tomllib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import manifold_lora as ml
from manifold_lora.adapters import adapters, axes, split
from manifold_lora.data.batches import evaluation_batches
from manifold_lora.data.tokens import load_tokenizer
from manifold_lora.evaluation.heldout import make_evaluate
from manifold_lora.training import train as training
from manifold_lora.training.config import TrainConfig
from manifold_lora.training.data import load_data
from manifold_lora.training.setup import effective_ranks
from manifold_lora.training.step import largest_residual
from tests.configs import train_config
from tests.tiny import data_file, model_directory
from tests.tolerances import EFFECTIVE_RANK, LOGITS, RESIDUAL

Settings = dict[str, Any]
pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("files")
    return model_directory(folder / "model"), data_file(folder / "train.jsonl")


@pytest.fixture
def settings(files: tuple[Path, Path], tmp_path: Path) -> Settings:
    return {
        "model": files[0],
        "data": files[1],
        "out": tmp_path / "run",
        "rank": 4,
        "targets": ("q_proj",),
        "steps": 6,
        "batch_size": 8,
        "eval_every": 3,
        "learning_rate": 2e-2,
        "warmup_steps": 1,
        "remat": "none",
    }


def run(settings: Settings) -> dict[str, Any]:
    return training.train(
        train_config(**settings), Console(file=io.StringIO(), width=200)
    )


def loss_of(settings: Settings, model: ml.Llama) -> float:
    data = load_data(train_config(**settings), load_tokenizer(settings["model"]))
    rebuild, factors, frozen = split(model)
    feed = evaluation_batches(data.held_out, batch_size=4, sequence_length=16)
    return make_evaluate(rebuild, axes(model))(factors, frozen, feed).loss


def saved_model(settings: Settings, name: str = "adapter") -> ml.Llama:
    model = ml.load_llama(settings["model"])
    model.remat = "none"
    ml.load_adapter(model, settings["out"] / name)
    return model


def test_a_run_continues_from_an_adapter(settings: Settings, tmp_path: Path):
    first = settings | {"method": "stella", "rank_pattern": {"0.*": 2}}
    summary = run(first)
    assert summary["loss_after"] < summary["loss_before"]
    assert summary["least_effective_rank"] > 1
    assert adapters(saved_model(first))["self_attn.q_proj"].ranks == (2, 4)
    # targets and patterns are those of the adapter
    then = settings | {
        "method": "stella",
        "adapter": settings["out"] / "adapter",
        "out": tmp_path / "then",
    }
    more = run(then)
    assert more["loss_before"] == pytest.approx(summary["loss_after"], rel=LOGITS)
    assert more["loss_after"] < more["loss_before"]
    for one, other in zip(
        jax.tree.leaves(ml.factors(saved_model(then, "start"))),
        jax.tree.leaves(ml.factors(saved_model(first))),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)

    refused = {
        "method": ({"method": "lora"}, "method: found stella, needed lora"),
        "rank": ({"rank": 2}, "rank: found 4, needed 2"),
        "alpha": ({"alpha": 1.0}, "alpha: found 8, needed 1.0"),
        "rslora": ({"rslora": True}, "rslora: found False, needed True"),
        "diagonal": ({"diagonal_s": True}, "diagonal_s: found False, needed True"),
        "targets": ({"targets": "v_proj"}, "needed v_proj"),
        "pattern": ({"rank_pattern": {"0.*": 3}}, "needed {'0.*': 3}"),
    }
    for name, (change, message) in refused.items():
        wrong = then | {"out": tmp_path / name} | change
        with pytest.raises(ml.InputError) as caught:
            run(wrong)
        assert message in str(caught.value) and "--adapter" in str(caught.value)
        assert not (tmp_path / name).exists()


@pytest.mark.slow
def test_a_continued_run_inherits_the_settings_of_its_adapter(
    settings: Settings, tmp_path: Path
):
    first = settings | {"method": "lora", "rank": 2, "targets": "q_proj", "alpha": 6.0}
    run(first)
    given = {"model": settings["model"], "data": settings["data"], "steps": 1}
    adapter = settings["out"] / "adapter"
    config = train_config(**given, adapter=adapter, dropout=0.25)
    inherited = config.adapter
    assert (inherited.method, inherited.rank, inherited.alpha) == ("lora", 2, 6)
    assert (inherited.targets, inherited.dropout) == ("q_proj", 0.25)
    assert config.learning_rate == train_config(**given, method="lora").learning_rate
    run(given | {"adapter": adapter, "dropout": 0.25, "out": tmp_path / "then"})
    saved = tomllib.loads((tmp_path / "then" / "config.toml").read_text())
    assert (saved["targets"], saved["dropout"], saved["rank"]) == ("q_proj", 0.25, 2)
    peft = json.loads((tmp_path / "then/adapter/adapter_config.json").read_text())
    assert (peft["target_modules"], peft["lora_dropout"]) == (["q_proj"], 0.25)
    from_python = TrainConfig(initial_adapter=adapter).adapter
    assert (from_python.method, from_python.targets) == ("lora", "q_proj")


def test_ranks_of_layers_that_are_not_adapted_do_not_count(files: tuple[Path, Path]):
    model = ml.load_llama(files[0])
    second = r"model\.layers\.1\..*q_proj"
    ml.attach(model, ml.AdapterConfig("stiefel", rank=4, targets=second))
    assert effective_ranks(model) == [pytest.approx(4, abs=EFFECTIVE_RANK)]


def test_diagonal_scaling_writes_the_merged_model(settings: Settings):
    scaled = settings | {"method": "lora", "diagonal_scaling": True}
    summary = run(scaled)
    names = sorted(p.name for p in settings["out"].iterdir())
    assert names == [
        ".lock",
        "checkpoints",
        "config.toml",
        "loss.png",
        "merged",
        "metrics.jsonl",
        "summary.json",
    ]
    assert summary["loss_after"] < summary["loss_before"]
    model = ml.load_llama(settings["out"] / "merged")
    model.remat = "none"
    assert loss_of(scaled, model) == pytest.approx(summary["loss_after"], rel=LOGITS)
    ids = load_tokenizer(settings["model"])("yes")["input_ids"]
    assert load_tokenizer(settings["out"] / "merged")("yes")["input_ids"] == ids
    plain = ml.load_llama(settings["model"]).layers.self_attn.q_proj.kernel[...]
    assert (model.layers.self_attn.q_proj.kernel[...] != plain).any()


def test_a_merged_model_is_saved_when_the_loss_is_nan(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
):
    make_step = training.make_step

    def poisoned(*args: Any) -> Any:
        step, calls = make_step(*args), itertools.count(1)

        def wrapped(*arguments: Any) -> Any:
            state, metrics = step(*arguments)
            if next(calls) == 5:
                metrics["loss"] = jnp.asarray(jnp.nan)
            return state, metrics

        return wrapped

    monkeypatch.setattr(training, "make_step", poisoned)
    scaled = settings | {"method": "lora", "diagonal_scaling": True}
    with pytest.raises(
        training.Diverged, match=r"step 5 .*merged/ has the best adapter, of step 3"
    ):
        run(scaled)
    kernel = ml.load_llama(settings["out"] / "merged").layers.self_attn.q_proj.kernel[
        ...
    ]
    assert np.isfinite(kernel).all()


@pytest.mark.slow
def test_landing_is_reported_and_saved_as_exported(settings: Settings):
    given = settings | {"method": "landing_stiefel", "project_on_export": True}
    summary = run(given)
    assert summary["last_residual"] > 1e-4
    model = saved_model(given)
    assert largest_residual(ml.manifold_tree(model), ml.factors(model)) < RESIDUAL
    loss = loss_of(given, model)
    assert loss == pytest.approx(summary["loss_exported"], rel=LOGITS)
    assert summary["loss_exported"] == pytest.approx(summary["loss_after"], rel=0.05)
    assert summary["energy_discarded"] == 0 and summary["ranks_exported"] == [4]


@pytest.mark.slow
def test_truncation_is_reported_and_saved_as_exported(settings: Settings):
    given = settings | {
        "method": "loram_br",
        "truncate_below": 0.84,
        "nuclear_decay": 1e-3,
    }
    summary = run(given)
    model = saved_model(given)
    ranks = {r for m in adapters(model).values() for r in m.ranks}
    assert summary["ranks_exported"] == sorted(ranks) and min(ranks) < 4
    assert adapters(model)["self_attn.q_proj"].ranks == (4, 2)
    assert 0 < summary["energy_discarded"] < 0.5
    assert loss_of(given, model) == pytest.approx(summary["loss_exported"], rel=LOGITS)
    assert summary["loss_exported"] != summary["loss_after"]
