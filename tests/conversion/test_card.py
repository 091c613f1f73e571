"""Model cards: the metadata that the Hub reads, and what people read."""

import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

import manifold_lora as ml
from manifold_lora.adapters import AdapterConfig
from manifold_lora.checkpoints.card import CARD, Run, model_card, serving
from manifold_lora.checkpoints.peft import save_adapter
from manifold_lora.methods import METHODS
from tests.checkpoints.peft_files import PLAIN, VARIED, attached
from tests.configs import train_config
from tests.tiny import data_file, model_directory


def rows(text: str) -> dict[str, str]:
    """The cells of all tables, by their first."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    cells = [re.split(r"(?<!\\) \| ", line.strip("| ")) for line in lines]
    return {row[0]: " ".join(row[1:]) for row in cells}


def read(text: str) -> Any:
    """A card as the Hub's library reads it, which fails for broken metadata."""
    return ModelCard(text)


def card(path: Path) -> Any:
    return read((path / CARD).read_text(encoding="utf-8"))


@pytest.mark.parametrize("method", METHODS)
def test_metadata_of_every_method(method: str):
    text = model_card(AdapterConfig(method), "meta-llama/Llama-3.2-1B", 16)
    data = read(text).data.to_dict()
    assert data["base_model"] == "meta-llama/Llama-3.2-1B"
    assert data["library_name"] == "peft" and data["license"] == "unknown"
    assert data["pipeline_tag"] == "text-generation"
    kind = "dora" if method in ("dora", "stiefel_dora") else "lora"
    assert {kind, method, "manifold-lora"} <= {*data["tags"]}
    assert "model-index" not in data
    options = AdapterConfig(method).options
    assert options.paper in text and options.update in text


def test_an_adapter_has_one(tmp_path: Path):
    save_adapter(
        attached(VARIED), tmp_path / "a", base_id="org/base", license="apache-2.0"
    )
    got = card(tmp_path / "a")
    assert got.data.license == "apache-2.0"
    assert got.data.base_model == "org/base"
    shown = rows(got.text)
    assert shown["rank"] == "3" and shown["scale of ΔW"] == "α/√r"
    assert shown["targets"] == "q_proj, v_proj, up_proj, down_proj"
    assert shown["rank pattern"] == "down_proj: 2"
    assert 'from_pretrained("org/base")' in got.text
    assert "License: apache-2.0" in got.text


def test_what_is_converted_has_one(tmp_path: Path):
    save_adapter(attached(PLAIN), tmp_path / "a", base_id="org/base")
    out = tmp_path / "out"
    ml.convert_adapter(
        ml.ConvertConfig(adapter=tmp_path / "a", method="stella", out=out)
    )
    got = card(out)
    assert got.data.base_model == "org/base" and "stella" in got.data.tags
    assert rows(got.text)["rank"] == "2"


@pytest.mark.parametrize("base", [None, "/home/me/llama", "llama", "a/b/c", "here/now"])
def test_a_base_that_is_not_on_the_hub(
    base: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The Hub refuses other names in the metadata; the text has them."""
    (tmp_path / "here" / "now").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    text = model_card(PLAIN, base, 2)
    assert read(text).data.base_model is None
    assert rows(text)["base"] == (base or "unknown")


def test_scores_settings_and_data_of_a_run():
    settings = {"data": ["/home/me/secret/train.jsonl"], "steps": 7, "seed": 3}
    summary: dict[str, Any] = {
        "loss_before": 2.5, "loss_after": 0.12345678, "accuracy_before": 0.25,
        "accuracy_after": 0.75, "exact_match_before": None, "exact_match_after": 0.5,
    }  # fmt: skip
    text = model_card(PLAIN, "org/base", 2, run=Run(settings, summary))
    shown = rows(text)
    assert shown["loss per answer token"] == "2.5 0.1235"
    assert shown["token accuracy"] == "0.25 0.75"
    assert shown["exact match"] == "– 0.5"
    assert shown["steps"] == "7" and shown["seed"] == "3"
    assert "`train.jsonl`" in text and "secret" not in text
    results = read(text).data.eval_results
    assert results is not None
    assert {r.metric_type: r.metric_value for r in results} == {
        "loss": 0.12345678, "accuracy": 0.75, "exact_match": 0.5,
    }  # fmt: skip


def test_a_run_without_evaluation():
    run = Run({}, {"loss_before": None, "loss_after": None})
    text = model_card(PLAIN, None, 2, run=run)
    assert "It was not evaluated." in text and "built-in example data" in text
    assert read(text).data.eval_results is None


def test_text_that_would_break_the_card():
    """Names with the characters of Markdown tables and of YAML."""
    config = AdapterConfig("lora", targets=r"model\.layers\.(0|1)\..*")
    text = model_card(config, "a: |\n- b", 2, license="x: [y")
    assert read(text).data.license == "x: [y"
    assert rows(text)["targets"] == r"model\.layers\.(0\|1)\..*"


@pytest.mark.parametrize(
    ("rank", "needed"), [(1, ""), (16, ""), (17, "32"), (300, "320"), (512, "512")]
)
def test_the_size_that_vllm_needs(rank: int, needed: str):
    assert serving(rank, False, "a").partition(" --max-lora-rank ")[2] == needed
    assert serving(rank, True, "a").startswith("vLLM, SGLang and llama.cpp have no")
    assert "up to 512" in serving(513, False, "a")


@pytest.mark.slow
def test_a_finished_run_and_its_export(tmp_path: Path):
    out = tmp_path / "run"
    config = train_config(
        model=model_directory(tmp_path / "model"),
        data=data_file(tmp_path / "train.jsonl"),
        out=out,
        method="stiefel",
        rank=2,
        steps=2,
        batch_size=4,
        sequence_length=32,
        license="mit",
        base_id="org/tiny",
    )
    summary = ml.train(config)
    got = card(out / "adapter")
    assert got.data.license == "mit" and got.data.base_model == "org/tiny"
    needed = f"{summary['loss_before']:.4g} {summary['loss_after']:.4g}"
    shown = rows(got.text)
    assert shown["loss per answer token"] == needed
    assert shown["steps"] == "2" and "`train.jsonl`" in got.text
    # others, which are not the result, have no scores
    assert card(out / "last").data.eval_results is None
    ml.export(ml.ExportConfig(adapter=out, out=tmp_path / "mlx", format="mlx"))
    other = card(tmp_path / "mlx")
    assert other.data.library_name == "mlx" and other.data.license == "unknown"
    assert rows(other.text)["loss per answer token"] == needed
    assert "mlx_lm.generate --model org/tiny" in other.text
