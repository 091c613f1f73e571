"""compare.json that is cut, binary or edited: refused in one message, or of use."""

import copy
import io
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from manifold_lora.comparison.report import show_table, summarise, write
from manifold_lora.comparison.results import ResultsFile, run_name
from manifold_lora.errors import InputError
from tests.comparison.cells import cell

SETTINGS = {
    "runs": {"lora": {"rank": 4}, "stiefel": {"rank": 4}},
    "baseline": "lora",
    "seeds": [0, 1],
    "search_seed": 2,
}
STEPS = 20


def finished() -> dict[str, Any]:
    cells = {}
    for method in SETTINGS["runs"]:
        for seed, searching in ((2, True), (0, False), (1, False)):
            name = run_name(method, [0.1], seed, STEPS, searching)
            cells[name] = cell(method, seed, [3.0] * STEPS, [4.0, 3.0, 1.5 + seed])
    content = {
        "settings": SETTINGS,
        "cells": cells,
        "held_out": {"validation": 2, "test": 3, "test_is_eval_data": False},
        "step_seconds": {"lora": 0.5, "stiefel": 0.6},
        "best": {"lora": [0.1], "stiefel": [0.1]},
    }
    return content | {"summary": summarise(content, STEPS)}


FINISHED = finished()


def paths(value: Any, path: tuple = ()) -> list[tuple]:
    """Where a JSON value has values inside."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    inside = []
    for key, item in items:
        inside.append((*path, key))
        if isinstance(item, dict | list):
            inside += paths(item, (*path, key))
    return inside


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 3) | st.sampled_from([2**31, 2**64, 10**400, -(10**30)]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=5),
    st.sampled_from([[], {}, [[]], [None], {"a": 1}, [1.0, 2.0], [0.1, 0.2, 0.3]]),
)


@st.composite
def edited(draw: st.DrawFn) -> bytes:
    """A finished or unfinished comparison with one to three changes."""
    content = copy.deepcopy(FINISHED)
    if draw(st.booleans()):
        del content["summary"]
    for _ in range(draw(st.integers(1, 3))):
        places = paths(content)
        *parents, last = draw(st.sampled_from(places)) if places else ("settings",)
        inner: Any = content
        for key in parents:
            inner = inner[key]
        if draw(st.booleans()):
            inner[last] = draw(VALUES)
        else:
            del inner[last]
    text = json.dumps(content).encode()
    if draw(st.integers(0, 4)) == 0:
        text = text[: draw(st.integers(0, len(text)))]
    if draw(st.integers(0, 4)) == 0:
        at = draw(st.integers(0, len(text)))
        text = text[:at] + draw(st.binary(min_size=1, max_size=4)) + text[at + 1 :]
    return text


@given(text=edited() | st.binary(max_size=30))
@settings(
    max_examples=400,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_a_damaged_file_is_refused_or_of_use(text: bytes, tmp_path):
    (tmp_path / "compare.json").write_bytes(text)
    try:
        content = ResultsFile(tmp_path, SETTINGS).content
    except InputError as error:
        assert "compare.json" in str(error) or "other settings" in str(error)
        assert "--overwrite" in str(error)
        return
    assert content["settings"] == SETTINGS
    console = Console(file=io.StringIO(), width=200)
    if "summary" in content:
        show_table(console, content)
    if FINISHED["cells"].keys() <= content["cells"].keys():  # nothing is run again
        used = {name: content["cells"][name] for name in FINISHED["cells"]}
        content |= {name: FINISHED[name] for name in ("held_out", "step_seconds")}
        content["cells"] = used
        content["summary"] = summarise(content, STEPS)
        write(tmp_path, content)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("settings", "seeds"), [0], "seeds was [0], is [0, 1]"),
        (("cells", 0, "losses"), [], "length >= 1"),
        (("cells", 0, "losses"), [1.0], "lacks losses"),
        (("cells", 0, "method"), "stiefel", "holds the results of 'stiefel rates 0.1"),
        (("cells", 1, "rates"), [0.2], "holds the results of 'lora rates 0.2 seed 0"),
        (("cells", 0, "rank"), "4", "Expected `int`, got `str`"),
        (("cells", 0, "final"), None, "lacks final"),
        (("cells", 0, "final", "accuracy"), 1.5, "Expected `float` <= 1"),
        (("cells", 1, "curve"), [{"step": 0, "loss": 1.0}], "after different steps"),
        (("step_seconds",), {"lora": 1.0}, "not those of the methods"),
        (("summary",), [], "summary is not that of the methods"),
        (("summary", 0, "accuracy"), None, "summary lacks measures"),
        (("held_out",), None, "summary without held_out"),
    ],
)
def test_what_is_wrong_is_named(path, value, message, tmp_path):
    content = copy.deepcopy(FINISHED)
    inner: Any = content
    for key in path[:-1]:  # a run by its number
        inner = [*inner.values()][key] if inner is content["cells"] else inner[key]
    if value is None:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    (tmp_path / "compare.json").write_text(json.dumps(content))
    with pytest.raises(InputError) as caught:
        ResultsFile(tmp_path, SETTINGS)
    assert message in str(caught.value) and "--overwrite" in str(caught.value)


def test_what_a_killed_process_left_is_no_obstacle(tmp_path):
    (tmp_path / ".compare.7.partial.json").write_text('{"sett')
    (tmp_path / ".DS_Store").touch()
    assert ResultsFile(tmp_path, SETTINGS).content["cells"] == {}


def test_a_failed_write_leaves_the_earlier_results(tmp_path, monkeypatch):
    results = ResultsFile(tmp_path, SETTINGS)
    name, result = next(iter(FINISHED["cells"].items()))
    results[name] = result
    before = (tmp_path / "compare.json").read_bytes()
    with pytest.raises(ValueError, match="JSON"):
        results["other"] = result | {"losses": [float("nan")]}
    assert (tmp_path / "compare.json").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1
