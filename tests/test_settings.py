"""Values of settings: numbers of any size, and paths."""

import math
from pathlib import Path
from typing import Any

import pytest

from manifold_lora.configuration.parts import (
    BatchConfig,
    CheckpointConfig,
    OptimizerConfig,
    ScheduleConfig,
)
from manifold_lora.errors import InputError
from manifold_lora.settings import (
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    PositiveNumber,
    Seed,
    check_renamed,
    decode,
    read_path,
)


@pytest.mark.parametrize(
    ("value", "hint", "message"),
    [
        (2**32, Seed, "must be at least 0, at most 4294967295, got 4294967296"),
        (-1, Seed, "must be at least 0, got -1"),
        (True, Seed, "must be an integer, got True"),
        (2**31, PositiveInt, "must be at least 1, at most 2147483647, got 2147483648"),
        (10**30, PositiveInt, f"at most 2147483647, got {10**30}"),
        (math.inf, PositiveFloat, "must be a positive number, at most 1e18, got inf"),
        (math.nan, PositiveFloat, "must be a positive number, got nan"),
        (-0.0, PositiveFloat, "must be a positive number, got -0.0"),
        (False, NonNegativeFloat, "must be a number, got False"),
        (10**30, PositiveNumber, "must be a positive number, at most 1e18"),
    ],
)
def test_numbers_out_of_range(value, hint, message):
    with pytest.raises(ValueError) as caught:
        decode(value, hint)
    assert message in str(caught.value)


@pytest.mark.parametrize("sign", [1, -1])
def test_integers_that_python_does_not_print(sign):
    with pytest.raises(ValueError, match=r"got an integer of more than 4300 digits$"):
        decode(sign * 10**5000, PositiveInt)


@pytest.mark.parametrize(
    ("text", "hint", "value"),
    [
        ("4294967295", Seed, 4294967295),
        ("4294967296", Seed, "at most 4294967295, got 4294967296"),
        ("9" * 30, Seed, "at most 4294967295, got 9999"),
        ("9" * 5000, Seed, "at most 4294967295, got inf"),
        ("1e999", PositiveFloat, "at most 1e18, got inf"),
        ("nan", PositiveFloat, "must be a positive number, got nan"),
        ("1_000", PositiveInt, 1000),
        ("+5", PositiveInt, 5),
        ("1.5", PositiveInt, "must be an integer, got 1.5"),
        ("", PositiveInt, "must be an integer, got ''"),
        ("x" * 500, PositiveInt, "(502 characters)"),
        ("1e-4", PositiveFloat, 1e-4),
    ],
    ids=range(12),
)
def test_numbers_as_text(text, hint, value):
    if not isinstance(value, str):
        assert decode(text, hint, from_text=True) == value
        return
    with pytest.raises(ValueError) as caught:
        decode(text, hint, from_text=True)
    assert value in str(caught.value)


@pytest.mark.parametrize(
    ("part", "settings", "words"),
    [
        (OptimizerConfig, {"seed": 2**32}, "seed must be at least 0, at most 42949"),
        (ScheduleConfig, {"warmup_steps": 10**12}, "at most 2147483647, got 10000"),
        (ScheduleConfig, {"steps": 10**12}, "at most 2147483647"),
        (BatchConfig, {"batch_size": 10**7}, "at most 1048576"),
        (BatchConfig, {"sequence_length": 10**9}, "at most 16777216"),
        (CheckpointConfig, {"keep_checkpoints": 10**20}, "at most 2147483647"),
    ],
)
def test_settings_have_limits(part: Any, settings: dict[str, Any], words: str):
    with pytest.raises(InputError) as caught:
        part(**settings)
    assert words in str(caught.value)


def test_home_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert decode("~/a", Path) == tmp_path / "a"
    assert decode("~", Path | None, from_text=True) == tmp_path
    assert decode("b/~", Path) == Path("b/~")
    assert decode(("~/a", Path("~/b")), tuple[Path, ...]) == (
        tmp_path / "a",
        tmp_path / "b",
    )
    assert read_path("~/a", "--out") == tmp_path / "a"


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("", "must be a path, got an empty text"),
        (3, "must be a path, got 3"),
        ("a\0b", r"without NUL characters, got 'a\x00b'"),
        ("a/" + "é" * 128 + "/b", "names have at most 255 bytes, got 'a/éé"),
        ("a/" * 3000, "at most 4095 bytes, got 'a/a"),
        ("a\udcff", r"must be a path in UTF-8, got 'a\udcff': rename it, or set a"),
        ("~no-such-user/a", "home of a user who does not exist: '~no-such-user/a'"),
    ],
    ids=range(7),
)
def test_paths_that_no_file_can_have(path, words):
    with pytest.raises(InputError) as caught:
        read_path(path, "--out")
    assert str(caught.value).startswith("--out ") and words in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("arguments", [[], ["train"], ["train", "--packing"]])
def test_nothing_is_renamed(arguments):
    check_renamed(arguments)
