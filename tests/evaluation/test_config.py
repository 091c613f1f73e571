"""What an evaluation is, from flags, from Python and from a run."""

from pathlib import Path
from typing import Any

import pytest

import manifold_lora as ml
from manifold_lora.cli.flags import join_repeated
from manifold_lora.evaluation.config import EvaluateConfig

RUN = """
model = "models/llama"
dtype = "float32"
date = "2026-01-31"
sequence_length = 256
eval_data = "held_out.jsonl"
method = "stella"
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "config.toml").write_text(RUN)
    return tmp_path


def test_a_run_gives_what_it_was_trained_with(run: Path):
    config = EvaluateConfig(run=run)
    assert (
        config.model
        == ml.EvaluateConfig(
            run=run, model=type(config.model)(Path("models/llama"), "float32")
        ).model
    )
    assert (config.date, config.sequence_length) == ("2026-01-31", 256)
    assert config.data == (Path("held_out.jsonl"),)
    assert config.systems == {"base": None, str(run): run}
    assert config.directory == run / "evaluation"


def test_what_is_given_counts_more_than_the_run(run: Path):
    base = type(EvaluateConfig().model)(Path("other"))
    config = EvaluateConfig(
        run=run, model=base, sequence_length=64, tasks=Path("tasks"), base=False
    )
    assert config.model.path == Path("other") and config.model.dtype == "float32"
    assert config.sequence_length == 64
    assert config.data == () and config.protocol == "llm-adapters"
    assert list(config.systems) == [str(run)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": "a", "tasks": "b"}, "--data and --tasks exclude each other"),
        ({"protocol": "e2e"}, "--protocol e2e needs --data"),
        ({"protocol": "stella"}, "--protocol stella needs --tasks"),
        ({"protocol": "e2e", "tasks": "b"}, "e2e needs --data"),
        ({"base": False}, "--no-base needs an --adapter"),
        ({"adapters": ("a", "a")}, "an adapter is given twice"),
        ({"mesh": "rows=2"}, "unknown axis 'rows'"),
        ({"num_beams": 0}, "num_beams must be at least 1, got 0"),
        ({"run": "nowhere"}, "nowhere is not a run: it has no config.toml"),
    ],
)
def test_mistakes_are_named(settings: dict[str, Any], message: str):
    with pytest.raises(ml.InputError, match=message):
        EvaluateConfig(**settings)


def test_runs_that_cannot_be_evaluated(run: Path):
    (run / "config.toml").write_text("model = 3\nsequence_length = 1")
    with pytest.raises(ml.InputError, match="model must be a path(.*)at least 2, got"):
        EvaluateConfig(run=run)
    (run / "config.toml").write_text("model = ")
    with pytest.raises(ml.InputError, match="config.toml cannot be read as TOML"):
        EvaluateConfig(run=run)
    (run / "config.toml").write_text(RUN)
    (run / "adapter").rmdir()
    (run / "merged").mkdir()
    with pytest.raises(ml.InputError, match=r"has no adapter/(.*) merged/: evaluate"):
        EvaluateConfig(run=run)


@pytest.mark.parametrize(
    ("given", "joined"),
    [
        ("R --adapter A --adapter B", "R --adapter A B"),
        ("--adapter=A --base --adapter B C", "--adapter A B C --base"),
        ("--data a --examples=3 --data b", "--data a b --examples=3"),
        ("--model a --model b", "--model a --model b"),
        ("--rank_pattern", "--rank_pattern"),
    ],
)
def test_values_of_a_repeated_flag_are_joined(given: str, joined: str):
    assert join_repeated(EvaluateConfig, given.split()) == joined.split()
