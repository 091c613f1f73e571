"""A whole comparison on a tiny model: what it writes, skips, repeats and refuses."""

import io
import itertools
import json
import math
import re

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file

import manifold_lora as ml
from manifold_lora.adapters import axes, split
from manifold_lora.comparison import compare as study
from manifold_lora.comparison.config import resolve_comparison
from manifold_lora.comparison.results import ResultsFile, run_name
from manifold_lora.comparison.runner import Runner
from manifold_lora.errors import InputError
from manifold_lora.evaluation import heldout
from manifold_lora.evaluation.batches import HeldOutBatches
from manifold_lora.training import train as training
from manifold_lora.training.optimizer import Rates
from tests.comparison.cells import splits_of
from tests.configs import compare_config, train_config
from tests.tiny import data_file, model_directory


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return {
        "model": model_directory(folder / "model"),
        "data": data_file(folder / "train.jsonl"),
        "out": folder / "compare",
        "methods": ("lora,stiefel",),
        "learning_rates": ("0.02",),
        "targets": ("q_proj",),
        "rank": 4,
        "seeds": 2,
        "steps": 6,
        "search_steps": 2,
        "batch_size": 8,
        "eval_every": 3,
        "warmup_steps": 2,
        "remat": "none",
    }


def compare(settings, console=None):
    return study.compare(compare_config(**settings), console or Console(quiet=True))


@pytest.fixture(scope="module")
def finished(settings):
    """The comparison, what it showed, every call of a step, runners and traces."""
    calls, runners, traces = [], [], []
    original = Runner.__init__
    loss = heldout.token_loss

    def traced(*args):
        traces.append(args)
        return loss(*args)

    def watched(self, *args):
        original(self, *args)
        runners.append(self)
        step = self.step

        def counted(state, frozen, batch, extra):
            calls.append((self.config.adapter.method, extra, batch["input_ids"]))
            return step(state, frozen, batch, extra)

        self.compiled, self.step = step, counted

    console = Console(file=io.StringIO(), width=200)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runner, "__init__", watched)
        patch.setattr(heldout, "token_loss", traced)
        content = compare(settings, console)
    shown = console.file.getvalue()  # pyright: ignore
    return content, shown, calls, runners, len(traces)


def final(content, method):
    cells = content["cells"].items()
    found = [c for k, c in cells if c["method"] == method and "search" not in k]
    return sorted(found, key=lambda cell: cell["seed"])


def test_what_is_written(settings, finished):
    content, shown, *_ = finished
    names = {"compare.json", "compare.md", "compare.png", "adapters"}
    assert {p.name for p in settings["out"].iterdir()} == names
    assert json.loads((settings["out"] / "compare.json").read_text()) == content
    assert (settings["out"] / "compare.png").read_bytes().startswith(b"\x89PNG")
    table = (settings["out"] / "compare.md").read_text()
    for name in ("lora", "stiefel"):
        assert f"| `{name}` |" in table and name in shown
        for seed in (0, 1):
            model = ml.load_llama(settings["model"])
            ml.load_adapter(model, settings["out"] / "adapters" / f"{name}-seed{seed}")
            assert ml.factors(model)


def test_the_numbers_of_a_cell_are_those_of_its_adapter(settings, finished):
    """The file of the adapter, read again, has the loss and the rank in the table."""
    content, *_ = finished
    folder = settings["out"] / "adapters" / "stiefel-seed1"
    cell = final(content, "stiefel")[1]
    model = ml.load_llama(settings["model"])
    model.remat = "none"
    ml.load_adapter(model, folder)
    rebuild, factors, frozen = split(model)
    splits = splits_of(settings)
    evaluate = heldout.make_evaluate(rebuild, axes(model))
    again = evaluate(factors, frozen, HeldOutBatches(splits.test, 128, 16))
    assert again.loss == pytest.approx(cell["final"]["loss"], abs=1e-6)
    assert again._asdict() == cell["final"] | {"loss": again.loss}
    other = evaluate(factors, frozen, HeldOutBatches(splits.validation, 128, 16))
    assert other.loss != pytest.approx(cell["final"]["loss"], abs=1e-4)
    ranks = []
    tensors = load_file(folder / "adapter_model.safetensors")
    for name, a in tensors.items():
        if "lora_A" not in name:
            continue
        b = tensors[name.replace("lora_A", "lora_B")].astype(np.float64)
        sigma = np.linalg.svd(b @ a, compute_uv=False)
        p = sigma[sigma > 1e-9 * sigma[0]] / sigma.sum()
        ranks.append(np.exp(-np.sum(p * np.log(p))))
    assert len(ranks) == 2
    assert cell["effective_rank_update"] == pytest.approx(np.mean(ranks), abs=1e-4)


def test_each_method_is_compiled_once(finished):
    *_, runners, evaluations = finished
    assert [runner.config.adapter.method for runner in runners] == ["lora", "stiefel"]
    assert [runner.compiled._cache_size() for runner in runners] == [1, 1]
    assert evaluations == 2  # times that the evaluation was traced


def test_all_methods_see_the_same_batches(finished):
    _, _, calls, *_ = finished
    by_method = {}
    for name, extra, ids in calls:
        if int(extra["steps"]) == 6:
            by_method.setdefault(name, []).append(ids)
    assert len(by_method["lora"]) == len(by_method["stiefel"]) == 2 * 6
    for one, other in zip(*by_method.values(), strict=True):
        np.testing.assert_array_equal(one, other)
    assert not np.array_equal(by_method["lora"][0], by_method["lora"][6])  # two seeds


def test_the_results_are_of_seeds_and_examples_that_the_search_never_saw(
    settings, finished
):
    content, shown, *_ = finished
    seeds = {
        searching: {
            cell["seed"]
            for key, cell in content["cells"].items()
            if key.endswith(" search") == searching
        }
        for searching in (True, False)
    }
    assert seeds == {True: {2}, False: {0, 1}}
    splits = splits_of(settings)
    parts = [
        {example.input_ids.tobytes() for example in part}
        for part in (splits.data.train, splits.validation, splits.test)
    ]
    # 40 records, of which a tenth is held out
    assert [len(part) for part in parts] == [36, 2, 2]
    assert len(set.union(*parts)) == 40
    assert content["held_out"] == {
        "validation": 2,
        "test": 2,
        "test_is_eval_data": False,
    }
    for text in (shown, (settings["out"] / "compare.md").read_text()):
        assert "on 2 validation examples, with seed 2" in text
        assert "on 2 test examples held out, mean" in text
        assert "over seeds 0, 1." in text


def test_the_search_takes_the_least_loss_and_grows(finished):
    content, *_ = finished
    for name, place in (("lora", 0), ("stiefel", 0), ("stiefel", 1)):
        best = content["best"][name]
        tried = {
            cell["rates"][place]: cell["final"]["loss"]
            for key, cell in content["cells"].items()
            if cell["method"] == name
            and "search" in key
            and all(
                rate == best[i]
                for i, rate in enumerate(cell["rates"])
                if i != place and place == 1
            )
            and (place == 1 or len(best) == 1 or cell["rates"][1] == 2e-4)
        }
        least = min(tried, key=tried.__getitem__)
        assert best[place] == pytest.approx(least)
        assert min(tried) < least < max(tried) or len(tried) >= 5


def test_the_summary_is_that_of_the_cells(finished):
    content, *_ = finished
    goal = np.mean([c["final"]["loss"] for c in final(content, "lora")])
    losses = [row["loss"][0] for row in content["summary"]]
    assert losses == sorted(losses)
    for row in content["summary"]:
        cells = final(content, row["method"])
        assert [cell["seed"] for cell in cells] == [0, 1]
        for key in ("loss", "accuracy", "exact_match"):
            values = [cell["final"][key] for cell in cells]
            mean, spread = sum(values) / 2, abs(values[0] - values[1]) / math.sqrt(2)
            assert row[key] == pytest.approx([mean, spread], abs=1e-12)
        curve = np.mean([[p["loss"] for p in c["curve"]] for c in cells], axis=0)
        steps = [point["step"] for point in cells[0]["curve"]]
        assert steps == [0, 3, 6]
        reached = row["steps_to_baseline"]
        if reached is None:
            assert (curve > goal).all()
        else:
            assert np.interp(reached, steps, curve) == pytest.approx(goal)
        times = content["step_seconds"]
        assert row["overhead"] == times[row["method"]] / times["lora"]
        # q_proj of two layers, 32 to 32, rank 4
        assert row["parameters"] == 2 * 4 * (32 + 32)
    stiefel = next(r for r in content["summary"] if r["method"] == "stiefel")
    assert stiefel["effective_rank_b"][0] == pytest.approx(4, abs=1e-3)
    assert 0 < stiefel["largest_residual"] < 1e-6


def test_a_cell_is_an_ordinary_run(settings, finished):
    """The same rates, seed and steps in the training loop give the same losses."""
    content, *_ = finished
    (rate,) = content["best"]["lora"]
    own = ("methods", "learning_rates", "seeds", "search_steps")
    given = {name: value for name, value in settings.items() if name not in own}
    given |= {"method": "lora", "learning_rate": rate}
    given |= {"out": settings["out"] / "../run"}
    training.train(train_config(**given), Console(file=io.StringIO()))
    rows = (settings["out"] / "../run/metrics.jsonl").read_text().splitlines()
    losses = [r["loss"] for r in map(json.loads, rows) if "loss" in r]
    assert final(content, "lora")[0]["losses"] == pytest.approx(losses, abs=2e-5)


def test_finished_cells_are_not_run_again(settings, finished, tmp_path, monkeypatch):
    content, *_ = finished
    before = (settings["out"] / "compare.json").read_text()
    compare(settings, console := Console(file=io.StringIO(), width=200))
    assert "finished" in console.file.getvalue()  # pyright: ignore
    assert (settings["out"] / "compare.json").read_text() == before

    ran = []

    def run(self, rates, seed, steps, *_):
        ran.append((self.config.adapter.method, seed, steps))
        return lost

    part = {k: v for k, v in content.items() if k not in ("summary", "best")}
    part["cells"] = dict(content["cells"])
    key = next(k for k in part["cells"] if "seed 1" in k and "stiefel" in k)
    lost = part["cells"].pop(key)
    (tmp_path / "compare.json").write_text(json.dumps(part))
    monkeypatch.setattr(Runner, "run", run)
    again = compare(settings | {"out": tmp_path})
    assert ran == [("stiefel", 1, 6)]
    assert again["summary"] == content["summary"]


def test_other_settings_are_refused(settings, finished):
    message = r"other settings.*runs\.lora\.rank was 4, is 2.*--overwrite"
    with pytest.raises(InputError, match=message):
        compare(settings | {"rank": 2})


def test_overwriting_removes_a_comparison_and_nothing_else(finished, tmp_path):
    one = {"seeds": [0], "runs": {}}
    name = next(iter(finished[0]["cells"]))
    ResultsFile(tmp_path, one)[name] = finished[0]["cells"][name]
    (tmp_path / "adapters" / "lora-seed0").mkdir(parents=True)
    (tmp_path / "compare.md").touch()
    (tmp_path / "notes.txt").touch()
    assert name in ResultsFile(tmp_path, one)
    assert name not in ResultsFile(tmp_path, {"seeds": [1]}, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(InputError, match="does not contain a comparison"):
        ResultsFile(tmp_path, {"seeds": [0]})
    (tmp_path / "compare.json").write_text('{"settings": {}}')
    with pytest.raises(InputError, match="missing required field `cells`.*--overwrite"):
        ResultsFile(tmp_path, {"seeds": [0]})
    with pytest.raises(InputError, match="is a file"):
        ResultsFile(tmp_path / "notes.txt", {})


def test_a_larger_method_gets_a_lower_rank(settings, finished, monkeypatch):
    monkeypatch.setattr(study, "BUDGET", 1.01)
    config = compare_config(**settings | {"methods": ("lora", "stella")})
    bar = study._progress(Console(quiet=True))
    made = study._Study(resolve_comparison(config), None, bar)  # pyright: ignore
    assert made.runner("lora").config.adapter.rank == 4
    # 2 layers: rank 4 has 2·4·64 + 2·16 parameters, over the 512 of lora
    stella = made.runner("stella")
    adapter = stella.config.adapter
    assert (adapter.rank, adapter.alpha) == (3, 6)  # of the same scale
    assert stella.trainable == 2 * (3 * 64 + 3 * 3)


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_divergence_ends_a_cell(finished, monkeypatch, name):
    lora, count = finished[3][0], itertools.count(1)

    def poisoned(*arguments):
        state, metrics = lora.compiled(*arguments)
        return state, metrics | ({name: math.nan} if next(count) == 3 else {})

    monkeypatch.setattr(lora, "step", poisoned)
    held_out = HeldOutBatches(lora.data.held_out, 128, 16)
    cell = lora.run(Rates(0.02), 0, 6, 3, held_out, lambda *_: None)
    assert cell["diverged"] and cell["steps"] == 3 and "final" not in cell
    assert len(cell["losses"]) == 3
    text = json.dumps(cell, allow_nan=False)  # JSON has no NaN
    assert ("null" in text) == (name == "loss")


def test_divergence_everywhere(settings, tmp_path):
    """Rates whose first update overflows: the message has each, and what to try."""
    wild = {"out": tmp_path, "methods": ("lora",), "learning_rates": (1e38, 3e38)}
    with pytest.raises(InputError) as caught:
        compare(settings | wild)
    message = str(caught.value)
    each = re.findall(r"([13]e\+38): diverged at step \d with loss (?:nan|\d)", message)
    assert each == ["1e+38", "3e+38"]
    assert message.startswith("lora: the learning rate diverges at every rate")
    assert "smaller --learning-rates, more --warmup-steps" in message
    text = (tmp_path / "compare.json").read_text()
    cells = json.loads(text, parse_constant=pytest.fail)["cells"]
    assert [cell["diverged"] for cell in cells.values()] == [True, True]


def test_an_interrupted_comparison_resumes(settings, finished, tmp_path, monkeypatch):
    content, *_ = finished
    settings, ran = settings | {"out": tmp_path}, []

    def run(self, rates, seed, steps, *_):
        if len(ran) == stop:
            raise KeyboardInterrupt
        used = [rate for rate in rates if rate is not None]
        ran.append(run_name(self.config.adapter.method, used, seed, steps, steps == 2))
        return content["cells"][ran[-1]]

    monkeypatch.setattr(Runner, "run", run)
    monkeypatch.setattr(study._Study, "time_steps", lambda _: content["step_seconds"])
    for stop in (2, len(content["cells"]) - 1):
        with pytest.raises(KeyboardInterrupt):
            compare(settings)
        written = json.loads((tmp_path / "compare.json").read_text())
        assert list(written["cells"]) == ran and len(ran) == stop
    stop = None
    assert compare(settings) == content
    assert ran == list(content["cells"])  # each once
    # All methods have their first seed before any has its second.
    last = [(cell["method"], cell["seed"]) for cell in content["cells"].values()][-4:]
    assert last == [("lora", 0), ("stiefel", 0), ("lora", 1), ("stiefel", 1)]
