"""Configurations: files, defaults, and every refusal."""

import dataclasses
import tomllib
from pathlib import Path

import numpy as np
import optax
import pytest
import tomli_w

from manifold_lora.errors import InputError
from manifold_lora.methods import METHODS
from manifold_lora.training.config import TrainConfig, as_toml, read_config, resolve
from manifold_lora.training.optimizer import build_schedule, named_optimizer
from tests.tolerances import FLOAT32

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"


def write(path, text):
    path.write_text(text)
    return path


def test_file_goes_over_defaults(tmp_path):
    text = 'method = "lora"\nrank = 4\nlearning_rate = 1\ntargets = "q_proj"\n'
    config = read_config(
        write(tmp_path / "c.toml", text + "rank_pattern = {q_proj = 2}")
    )
    expected = {
        "method": "lora",
        "rank": 4,
        "learning_rate": 1.0,
        "targets": ("q_proj",),
        "rank_pattern": {"q_proj": 2},
    }
    assert config == dataclasses.replace(TrainConfig(), **expected)


def test_resolved_config_reads_back_as_itself(tmp_path):
    config = resolve(TrainConfig(data=Path("x.jsonl"), rank_pattern={"q_proj": 2}))
    text = tomli_w.dumps(as_toml(config))
    again = resolve(read_config(write(tmp_path / "c.toml", text)))
    assert as_toml(again) == as_toml(config) == tomllib.loads(text)


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.toml")), ids=lambda f: f.name)
def test_shipped_configs_are_valid(file):
    resolve(read_config(file))


def test_defaults_depend_on_method_model_and_data():
    builtin, given = resolve(TrainConfig()), resolve(TrainConfig(model=Path("m")))
    assert builtin.steps and builtin.epochs is None
    assert resolve(TrainConfig(data=Path("d"))).epochs == 3
    assert given.free_learning_rate == 2e-4 and given.learning_rate == 0.1
    assert resolve(TrainConfig(model=Path("m"), method="lora")).learning_rate == 2e-4
    assert builtin.alpha == 32 and resolve(TrainConfig(rank=4)).alpha == 8
    assert builtin.run_directory == Path("runs/stiefel")
    for name, row in METHODS.items():
        config = resolve(TrainConfig(method=name, model=Path("m")))
        assert config.start == row.inits[0] and config.learning_rate == row.rate
        assert config.free_learning_rate == row.free_rate
        config = resolve(TrainConfig(method=name))
        assert config.learning_rate == row.builtin_rate
        assert config.free_learning_rate == row.builtin_free_rate


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("rnk = 4", ["'rnk'", "Did you mean rank?"]),
        ('rank = "four"', ["rank = 'four'", "int"]),
        ("rank = 4.5", ["rank = 4.5"]),
        ("rank = true", ["rank = True"]),
        ("learning_rate = true", ["learning_rate"]),
        ('schedule = "linaer"', ["schedule", "cosine"]),
        ("targets = [1]", ["targets"]),
        ("rank_pattern = {q_proj = 'x'}", ["rank_pattern"]),
        ("packing = 1", ["packing"]),
        ('fixed_a = "both"', ["fixed_a", "random", "projection"]),
        ('second_moment = "rows"', ["second_moment", "coordinate", "scalar"]),
        ("diagonal_s = 1", ["diagonal_s = 1"]),
        ("rank = \nseed = 1", ["not valid TOML", "line 1"]),
        ('rnk = 1\nmetod = "x"', ["rnk", "Did you mean method?"]),
    ],
)
def test_bad_files(tmp_path, text, messages):
    with pytest.raises(InputError) as caught:
        read_config(write(tmp_path / "c.toml", text))
    assert all(message in str(caught.value) for message in [*messages, "c.toml"])


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_config(tmp_path / "none.toml")


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
        ({"method": "lora", "lora_plus_ratio": 0.0}, "--lora-plus-ratio must be a pos"),
        ({"method": "landing_oblique", "attraction": -1.0}, "--attraction must be"),
        ({"method": "loram_br", "nuclear_decay": -1e-3}, "--nuclear-decay must be at"),
        ({"method": "loram_br", "truncate_below": -1.0}, "--truncate-below must be at"),
    ],
)
def test_values_out_of_range(change, message):
    with pytest.raises(InputError, match=message):
        resolve(dataclasses.replace(TrainConfig(), **change))


def test_all_problems_come_at_once():
    with pytest.raises(InputError, match=r"--rank.*--dropout|--dropout.*--rank"):
        resolve(TrainConfig(rank=0, dropout=2.0))


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 10])
def test_schedules(kind, warmup):
    config = resolve(TrainConfig(schedule=kind, warmup_steps=warmup))
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
    schedule = build_schedule(resolve(TrainConfig(warmup_steps=100)), 1.0, 3)
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
