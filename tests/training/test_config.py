"""Configurations: files, defaults, and every refusal."""

import dataclasses
import tomllib
from pathlib import Path

import numpy as np
import optax
import pytest
import tomli_w

from manifold_lora.adapters.options import inits, options_class
from manifold_lora.configuration.flat import (
    Source,
    compose,
    entries,
    flatten,
    part,
    read_toml,
)
from manifold_lora.configuration.parts import ScheduleConfig
from manifold_lora.errors import InputError
from manifold_lora.methods import METHODS
from manifold_lora.optimizers.named import named_optimizer
from manifold_lora.settings import setting
from manifold_lora.training.config import TrainConfig
from manifold_lora.training.optimizer import build_schedule
from tests.configs import train_config
from tests.tolerances import FLOAT32

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"


def write(path, text):
    path.write_text(text)
    return path


def read(path):
    return compose(TrainConfig, read_toml(path, TrainConfig))


FLAT = """
method = "stella"
rank = 4
learning_rate = 1
targets = ["q_proj"]
rank_pattern = {q_proj = 2}
diagonal_s = true
"""
TABLES = """
learning_rate = 1
[adapter]
method = "stella"
rank = 4
targets = "q_proj"
rank_pattern = {q_proj = 2}
diagonal_s = true
[model]
"""


@pytest.mark.parametrize("text", [FLAT, TABLES], ids=["flat", "tables"])
def test_a_file_overrides_defaults(tmp_path, text):
    config = read(write(tmp_path / "c.toml", text))
    assert config.learning_rate == 1.0 and isinstance(config.learning_rate, float)
    assert (config.adapter.method, config.adapter.rank) == ("stella", 4)
    assert config.adapter.targets == "q_proj"
    assert config.adapter.rank_pattern == {"q_proj": 2}
    assert config.adapter.options.diagonal_s
    given = {"learning_rate": 1, "method": "stella", "rank": 4, "targets": "q_proj"}
    same = train_config(**given, rank_pattern={"q_proj": 2}, diagonal_s=True)
    assert config == same != train_config(**given)


def test_a_key_in_the_table_of_another_part(tmp_path):
    file = write(tmp_path / "c.toml", "rnk = 1\n[data]\nrank = 4\nlearning_rate = 1")
    with pytest.raises(InputError) as caught:
        read(file)
    assert "rank stands in [data] and belongs in [adapter]" in str(caught.value)
    assert "Did you mean rank?" in str(caught.value)
    assert "learning_rate stands in [data] and belongs before" in str(caught.value)


@pytest.mark.parametrize("method", METHODS)
def test_a_flattened_config_reads_back_as_itself(tmp_path, method):
    config = train_config(
        data=Path("x.jsonl"), method=method, rank_pattern={"q_proj": 2}
    )
    text = tomli_w.dumps(flatten(config))
    assert flatten(config) == tomllib.loads(text)
    assert read(write(tmp_path / "c.toml", text)) == config


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.toml")), ids=lambda f: f.name)
def test_shipped_configs_are_valid(file):
    read(file)


def test_every_setting_is_declared_once_and_described():
    settings = entries(TrainConfig)
    assert len(settings) > 50
    for entry in settings.values():
        for field in entry.fields.values():
            assert field.metadata["help"], entry.name


def test_defaults_depend_on_method_model_and_data():
    builtin, given = train_config(), train_config(model="m")
    assert (builtin.schedule.steps, builtin.schedule.epochs) == (600, None)
    assert train_config(data="d").schedule.epochs == 3
    assert dataclasses.astuple(builtin.batch) == (8, 1, 128) and builtin.data.packing
    data = train_config(data="d")
    assert dataclasses.astuple(data.batch) == (16, 1, 512) and not data.data.packing
    assert given.free_learning_rate == 2e-4 and given.learning_rate == 0.1
    assert train_config(model="m", method="lora").learning_rate == 2e-4
    assert builtin.adapter.alpha == 32 and train_config(rank=4).adapter.alpha == 8
    assert builtin.run_directory == Path("runs/stiefel")
    for name in METHODS:
        rates = options_class(name).learning_rates
        free = options_class(name).free_learning_rates
        config = train_config(method=name, model="m")
        assert config.adapter.options.init == inits(name)[0]
        assert config.learning_rate == rates.default
        assert config.free_learning_rate == (free and free.default)
        config = train_config(method=name)
        assert config.learning_rate == rates.builtin
        assert config.free_learning_rate == (free and free.builtin)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WithoutAdapter:
    """A command's configuration that has no adapter."""

    schedule: ScheduleConfig = part(ScheduleConfig)
    prompt: str = setting("", "what to complete")


def test_a_configuration_without_an_adapter():
    assert [*entries(WithoutAdapter)] == [
        "prompt",
        "steps",
        "epochs",
        "schedule",
        "warmup_steps",
    ]
    config = compose(WithoutAdapter, Source({"prompt": "a", "warmup_steps": 3}))
    assert (config.prompt, config.schedule.warmup_steps) == ("a", 3)
    with pytest.raises(InputError, match="unknown key 'diagonal_s'"):
        compose(WithoutAdapter, Source({"diagonal_s": True}))


def test_parts_are_checked_when_they_are_made():
    with pytest.raises(InputError, match="warmup_steps must be at least 0, got -1"):
        ScheduleConfig(warmup_steps=-1)
    with pytest.raises(InputError, match="learning_rate must be a positive number"):
        TrainConfig(learning_rate=0.0)
    changed = dataclasses.replace(
        TrainConfig(), schedule=ScheduleConfig(steps=7, warmup_steps=3)
    )
    assert (changed.schedule.steps, changed.learning_rate) == (7, 0.03)


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("rnk = 4", ["'rnk'", "Did you mean rank?"]),
        ('rank = "four"', ["rank must be an integer, got 'four'"]),
        ("rank = 4.5", ["rank must be an integer, got 4.5"]),
        ("rank = true", ["rank must be an integer, got True"]),
        ("learning_rate = true", ["learning_rate must be a number, got True"]),
        ('schedule = "linaer"', ["schedule", "cosine"]),
        ("targets = [1]", ["targets must be text or a list"]),
        (
            "rank_pattern = {q_proj = 'x'}",
            ["rank_pattern for q_proj must be an integer, got 'x'"],
        ),
        ("packing = 1", ["packing must be true or false, got 1"]),
        ('fixed_a = "both"', ["fixed_a", "random", "projection"]),
        ('second_moment = "rows"', ["second_moment", "coordinate", "scalar"]),
        ("diagonal_s = 1", ["diagonal_s must be true or false, got 1"]),
        ("rank = \nseed = 1", ["not valid TOML", "line 1"]),
        ("start = 'zero'", ["'start' is now called 'init'"]),
        ("attraction = 1", ["'attraction' is now called 'penalty_weight'"]),
        ('rnk = 1\nmetod = "x"', ["rnk", "Did you mean method?"]),
    ],
)
def test_bad_files(tmp_path, text, messages):
    with pytest.raises(InputError) as caught:
        read(write(tmp_path / "c.toml", text))
    assert all(message in str(caught.value) for message in [*messages, "c.toml"])


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 0.0}, "--learning-rate must be a positive number, got 0"),
        ({"learning_rate": float("nan")}, "--learning-rate"),
        ({"free_learning_rate": -1.0}, "--free-learning-rate"),
        ({"steps": 0}, "--steps must be at least 1, got 0"),
        ({"epochs": 0}, "--epochs"),
        ({"steps": 1, "epochs": 1}, "exclude each other"),
        ({"rank": 0}, "--rank must be at least 1"),
        ({"alpha": 0.0}, "--alpha"),
        ({"dropout": 1.0}, r"--dropout must be in \[0, 1\), got 1.0"),
        ({"dropout": -0.1}, "--dropout"),
        ({"batch_size": 0}, "--batch-size"),
        ({"batch_size": 6, "accumulate": 4}, "multiple of --accumulate"),
        ({"sequence_length": 1}, "--sequence-length"),
        ({"warmup_steps": -1}, "--warmup-steps"),
        ({"clip": -1.0}, "--clip"),
        ({"seed": -1}, "--seed"),
        ({"patience": 0}, "--patience"),
        ({"learning_rate": float("inf")}, "--learning-rate must be a positive"),
        ({"method": "lora", "lora_plus_ratio": 0.0}, "--lora-plus-ratio must be a pos"),
        (
            {"method": "landing_oblique", "penalty_weight": -1.0},
            "--penalty-weight must",
        ),
        ({"method": "loram_br", "nuclear_decay": -1e-3}, "--nuclear-decay must be at"),
        ({"method": "loram_br", "truncate_below": -1.0}, "--truncate-below must be at"),
    ],
)
def test_values_out_of_range(change, message):
    with pytest.raises(InputError, match=message):
        train_config(**change)


def test_all_problems_come_at_once():
    with pytest.raises(InputError, match=r"--rank.*--dropout.*--batch-size"):
        train_config(rank=0, dropout=2.0, batch_size=0)


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 10])
def test_schedules(kind, warmup):
    config = ScheduleConfig(schedule=kind, warmup_steps=warmup)
    schedule = build_schedule(config, 0.5, 100)
    rates = np.array([float(schedule(step)) for step in range(101)])  # pyright: ignore
    after = np.arange(101 - warmup) / (100 - warmup)
    expected = {
        "linear": 0.5 * (1 - after),
        "cosine": 0.25 * (1 + np.cos(np.pi * after)),
        "constant": np.full_like(after, 0.5),
    }[kind]
    np.testing.assert_allclose(rates[warmup:], expected, atol=FLOAT32)
    rising = 0.5 * (1 + np.arange(warmup)) / (warmup + 1)
    np.testing.assert_allclose(rates[:warmup], rising, atol=FLOAT32)
    assert rates[0] > 0


def test_short_runs_still_warm_up():
    schedule = build_schedule(ScheduleConfig(warmup_steps=100), 1.0, 3)
    assert [float(schedule(s)) > 0 for s in range(3)] == [True] * 3  # pyright: ignore


def test_any_optax_optimiser_by_name():
    params = {"x": np.ones(3, np.float32)}
    for name, plain in [
        ("adamw", optax.adamw),
        ("lion", optax.lion),
        ("sgd", optax.sgd),
    ]:
        options = {} if name == "sgd" else {"weight_decay": 0.1}
        mine = named_optimizer(name, options.get("weight_decay", 0.0))(1e-2)
        theirs = plain(1e-2, **options)
        a, _ = mine.update(params, mine.init(params), params)
        b, _ = theirs.update(params, theirs.init(params), params)
        np.testing.assert_array_equal(a["x"], b["x"])  # pyright: ignore
    with pytest.raises(InputError, match="Did you mean adamw"):
        named_optimizer("adamww", 0.0)
    with pytest.raises(InputError, match="--weight-decay 0.1"):
        named_optimizer("sgd", 0.1)
