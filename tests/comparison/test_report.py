"""The summary of results whose statistics are obvious."""

import io

import numpy as np
import pytest
from rich.console import Console

from manifold_lora.comparison.plot import plot_comparison
from manifold_lora.comparison.report import show_table, summarise, write
from tests.comparison.cells import cell


@pytest.fixture
def content():
    """The baseline ends at 2, and the mean of the other passes that halfway to 10."""
    flat, falling = [3.0] * 20, [4.0] * 6 + [2.0] * 14
    lost = {
        "diverged": True,
        "losses": [5.0, None],
        "curve": [{"step": 0, "loss": 4.0}],
    }
    grids = {
        f"{name} {rates} search": cell(name, 0, [], [1.0], rates)
        for name, grid in {
            "lora": [(0.05,), (0.1,), (0.2,)],
            "stiefel": [(0.05, 1), (0.1, 1), (0.2, 1), (0.1, 2), (0.1, 0.5)],
        }.items()
        for rates in grid
    }
    both = {"rates": [0.1, 2]}
    runs = {
        "lora 0": cell("lora", 0, flat, [4.0, 3.0, 1.5]),
        "lora 1": cell("lora", 1, flat, [4.0, 3.0, 2.5]),
        "lora 2": cell("lora", 2, flat, [4.0]) | lost,
        "stiefel 0": cell("stiefel", 0, falling, [4.0, 0.5, 0.25]) | both,
        "stiefel 1": cell("stiefel", 1, falling, [2.0, 1.5, 0.75]) | both,
    }
    return {
        "settings": {
            "runs": {"lora": {}, "stiefel": {}},
            "baseline": "lora",
            "seeds": [0, 1],
            "search_seed": 2,
        },
        "held_out": {"validation": 500, "test": 1234, "test_is_eval_data": True},
        "cells": grids | runs,
        "step_seconds": {"lora": 0.5, "stiefel": 0.6},
    }


def test_statistics(content):
    stiefel, lora = summarise(content, 20)  # the better one first
    assert (lora["method"], lora["seeds"], lora["diverged"]) == ("lora", 3, 1)
    # 1.5 and 2.5; the seed that diverged is ignored
    assert lora["loss"] == pytest.approx([2.0, 0.5**0.5])
    assert lora["accuracy"] == pytest.approx([0.55, 0.1 * 0.5**0.5])
    assert lora["exact_match"] == pytest.approx([0.3, 0.2 * 0.5**0.5])
    assert lora["effective_rank_b"] == pytest.approx([3.5, 0.5**0.5])
    assert lora["least_effective_rank_b"] == 2.0
    assert (lora["steps_to_baseline"], lora["share_of_steps"]) == (20, 1)
    # The mean falls from 3 at step 0 to 1 at step 10: 2 is at step 5, of 0.6 s each.
    assert stiefel["steps_to_baseline"] == pytest.approx(5)
    assert stiefel["share_of_steps"] == pytest.approx(0.25)
    assert stiefel["seconds_to_baseline"] == pytest.approx(3.0)
    assert stiefel["overhead"] == pytest.approx(1.2)
    # Means of two steps: 4 until step 6, 3 (lora's) at step 7, then 2.
    assert stiefel["training"]["steps_to_baseline"] == pytest.approx(7)
    assert stiefel["training"]["seconds_to_baseline"] == pytest.approx(7 * 0.6)
    assert stiefel["training_loss"] == pytest.approx([2.0, 0.0])


def test_a_target_that_is_not_reached_and_a_missing_one(content):
    for name in ("stiefel 0", "stiefel 1"):
        content["cells"][name]["curve"] = [{"step": 0, "loss": 9.0}]
    row = next(r for r in summarise(content, 20) if r["method"] == "stiefel")
    assert row["steps_to_baseline"] is row["seconds_to_baseline"] is None
    for name in ("lora 0", "lora 1"):
        content["cells"][name]["diverged"] = True
    rows = summarise(content, 20)
    assert [row["method"] for row in rows] == ["stiefel", "lora"]
    assert rows[0]["steps_to_baseline"] is None and "loss" not in rows[1]


def test_the_table(content, tmp_path):
    content["summary"] = summarise(content, 20)
    write(tmp_path, content)
    text = (tmp_path / "compare.md").read_text()
    lines = [line.split(" | ") for line in text.splitlines() if line.startswith("| `")]
    assert lines[0][:7] == [
        "| `stiefel`",
        "4",
        "1,000",
        "0.1 / 2 (edge)",  # 2 is the largest free rate of 0.5, 1, 2
        "0.5000 ± 0.3536",
        "55.0% ± 7.1%",
        "30.0% ± 14.1%",
    ]
    assert lines[0][7:] == ["5 (25%)", "3", "1.20 ×", "–", "3.50", "2.50 |"]
    assert lines[1][3:5] == ["0.1", "2.0000 ± 0.7071 (1 diverged)"]
    assert "(edge): a best rate" in text
    assert "on 500 validation examples, with seed 2" in text
    assert "on 1,234 test examples of --eval-data" in text
    console = Console(file=io.StringIO(), width=80)
    show_table(console, content)
    shown = console.file.getvalue()  # pyright: ignore
    for word in ("0.1 / 2 (edge)", "0.5000 ± 0.3536", "5 (25%)", "1.20 ×"):
        assert word in shown


@pytest.mark.pictures
@pytest.mark.parametrize(
    "curves",
    [
        {},  # every method diverged
        {"stella": np.array([[0.0, 2, 3], [5, 1, 1]])},  # without the baseline
        {"lora": np.array([[0.0, 1], [5, 1]])},  # nothing learnt
        {"lora": np.array([[0.0, 1], [5, 0]])},  # nothing left to learn
        {f"m{i}": np.array([[0.0, 90], [5, 0.1 * i + 0.1]]) for i in range(9)},
    ],
)
def test_plots_of_extreme_curves(tmp_path, curves):
    """Matplotlib warns about a broken plot, and warnings are errors in tests."""
    plot_comparison(tmp_path / "p.png", curves, "lora")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
