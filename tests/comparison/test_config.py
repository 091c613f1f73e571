"""Resolved comparisons, and invalid configurations."""

from pathlib import Path

import pytest

from manifold_lora.adapters.lora import LoRAOptions
from manifold_lora.adapters.loram_br import LoRAMBoundedOptions
from manifold_lora.adapters.stella import StellaOptions
from manifold_lora.cli.main import main
from manifold_lora.comparison.config import (
    CompareConfig,
    Comparison,
    resolve_comparison,
)
from manifold_lora.configuration.flat import compose, read_toml
from manifold_lora.errors import InputError
from tests.configs import compare_config

STUDIES = Path(__file__).parents[2] / "examples" / "studies"


def resolved(**settings) -> Comparison:
    return resolve_comparison(compare_config(**settings))


def read(file: Path) -> CompareConfig:
    return compose(CompareConfig, read_toml(file, CompareConfig))


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"methods": ("lora", "stelal")}, ["unknown method 'stelal'", "stella"]),
        ({"methods": ()}, ["at least one method"]),
        ({"learning_rates": ("fast",)}, ["positive numbers or auto, got fast"]),
        ({"learning_rates": ("auto", "1")}, ["got auto"]),
        ({"seeds": 0}, ["--seeds must be at least 1"]),
        ({"search_steps": 0}, ["--search-steps must be at least 1"]),
        ({"learning_rate": 1.0}, ["unknown key", "Did you mean learning_rates"]),
        ({"free_learning_rate": 1.0}, ["unknown key 'free_learning_rate'"]),
        ({"best_metric": "accuracy"}, ["unknown key 'best_metric'"]),
        ({"learning_rates": (0.0, -1)}, ["auto, got 0.0", "auto, got -1"]),
        ({"rank": 0}, ["--rank must be at least 1"]),
        ({"diagonal_s": True}, ["no method of the comparison takes diagonal_s=True"]),
        ({"init": "svd_major"}, ["takes init=svd_major"]),
        ({"init": "svd"}, ["--init must be one of kaiming", "svd_major", "got 'svd'"]),
        ({"start": "svd_major"}, ["'start' is now called 'init'"]),
    ],
)
def test_bad_settings(changes, parts):
    with pytest.raises(InputError) as caught:
        compare_config(**{"methods": ("lora,stiefel",)} | changes)
    for part in parts:
        assert part in str(caught.value)


def test_options_go_to_the_methods_that_have_them():
    plan = resolved(methods=("lora stella", "loram_br"), diagonal_s=True, init="zero")
    options = {name: run.adapter.options for name, run in plan.runs.items()}
    assert options == {
        "lora": LoRAOptions(init="kaiming"),
        "stella": StellaOptions(diagonal_s=True, init="zero"),
        "loram_br": LoRAMBoundedOptions(init="zero"),
    }
    assert plan.baseline == "lora"


def test_default_grids_of_papers_and_of_the_built_in_base():
    given = resolved(methods=("stella",), model="somewhere")
    assert given.grids["stella"] == (2e-4, 5e-4, 1e-3)
    builtin = resolve_comparison(CompareConfig(methods=("stella",)))
    assert builtin.grids["stella"] == pytest.approx((5e-3 / 3, 5e-3, 15e-3))
    assert builtin.baseline == "stella"


def test_the_command_reads_a_file(tmp_path, capsys):
    file = tmp_path / "c.toml"
    file.write_text('methods = ["lora"]\nseedz = 2\n')
    with pytest.raises(SystemExit) as stopped:
        main(["compare", "--config", str(file)])
    assert stopped.value.code == 2 and "Did you mean seed" in capsys.readouterr().err
    file.write_text('methods = ["lora"]\nseeds = 0\n')
    with pytest.raises(SystemExit) as stopped:
        main(["compare", "--config", str(file)])
    assert stopped.value.code == 2
    assert f"{file}: seeds must be at least 1" in capsys.readouterr().err
    file.write_text('methods = "lora,stella"\nlearning_rates = [3e-3, 1, "2,3e-3"]\n')
    plan = resolve_comparison(read(file))
    assert set(plan.runs) == {"lora", "stella"} and plan.grids["lora"] == (3e-3, 1, 2)


def test_settings_of_a_single_run_are_not_flags(capsys):
    with pytest.raises(SystemExit):
        main(["compare", "--method", "lora"])
    error = capsys.readouterr().err
    assert "Unrecognized options" in error and "--methods" in error
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    shown = capsys.readouterr().out
    assert "--methods" in shown and "--learning-rates" in shown
    for flag in (
        "--method ",
        "--learning-rate ",
        "--patience",
        "--report",
        "--adapter",
    ):
        assert flag not in shown


@pytest.mark.parametrize("file", sorted(STUDIES.glob("*.toml")), ids=lambda f: f.name)
def test_shipped_studies_are_valid(file):
    plan = resolve_comparison(read(file))
    assert len(plan.seeds) == 3 and plan.shared.output.out is not None
