"""A whole comparison on a tiny model: what it writes, skips, repeats and refuses."""

import dataclasses
import io
import itertools
import json
import math

import numpy as np
import pytest
from rich.console import Console

import manifold_lora as ml
from manifold_lora.cli.main import main
from manifold_lora.errors import InputError
from manifold_lora.studies import compare as study
from manifold_lora.studies.config import CompareConfig, resolve_comparison
from manifold_lora.studies.runner import Runner
from manifold_lora.training.optimizer import Rates
from tests.tiny import data_file, model_directory


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return CompareConfig(
        model=model_directory(folder / "model"),
        data=data_file(folder / "train.jsonl"),
        out=folder / "compare",
        methods=("lora,stiefel",),
        learning_rates=("0.02",),
        targets=("q_proj",),
        rank=4,
        seeds=2,
        steps=6,
        search_steps=2,
        batch_size=8,
        eval_every=3,
        warmup_steps=2,
        remat=False,
    )


@pytest.fixture(scope="module")
def finished(config):
    """The comparison, what it showed, every call of a step, and its runners."""
    calls, runners = [], []
    original = Runner.__init__

    def watched(self, *args):
        original(self, *args)
        runners.append(self)
        step = self.step

        def counted(state, frozen, batch, extra):
            calls.append((self.config.method, extra, batch["input_ids"]))
            return step(state, frozen, batch, extra)

        self.compiled, self.step = step, counted

    console = Console(file=io.StringIO(), width=200)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runner, "__init__", watched)
        content = study.compare(config, console)
    return content, console.file.getvalue(), calls, runners  # pyright: ignore


def final(content, method):
    cells = content["cells"].items()
    found = [c for k, c in cells if c["method"] == method and "search" not in k]
    return sorted(found, key=lambda cell: cell["seed"])


def test_what_is_written(config, finished):
    content, shown, *_ = finished
    names = {"compare.json", "compare.md", "compare.png", "adapters"}
    assert {p.name for p in config.out.iterdir()} == names
    assert json.loads((config.out / "compare.json").read_text()) == content
    assert (config.out / "compare.png").read_bytes().startswith(b"\x89PNG")
    table = (config.out / "compare.md").read_text()
    for name in ("lora", "stiefel"):
        assert f"| `{name}` |" in table and name in shown
        for seed in (0, 1):
            model = ml.load_llama(config.model)
            ml.load_adapter(model, config.out / "adapters" / f"{name}-seed{seed}")
            assert ml.factors(model)


def test_each_method_is_compiled_once(finished):
    *_, runners = finished
    assert [runner.config.method for runner in runners] == ["lora", "stiefel"]
    assert [runner.compiled._cache_size() for runner in runners] == [1, 1]


def test_all_methods_see_the_same_batches(finished):
    _, _, calls, _ = finished
    by_method = {}
    for name, extra, ids in calls:
        if int(extra["steps"]) == 6:
            by_method.setdefault(name, []).append(ids)
    assert len(by_method["lora"]) == len(by_method["stiefel"]) == 2 * 6
    for one, other in zip(*by_method.values(), strict=True):
        np.testing.assert_array_equal(one, other)
    assert not np.array_equal(by_method["lora"][0], by_method["lora"][6])  # two seeds


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
    goal = np.mean([c["curve"][-1]["loss"] for c in final(content, "lora")])
    losses = [row["loss"][0] for row in content["summary"]]
    assert losses == sorted(losses)
    for row in content["summary"]:
        cells = final(content, row["method"])
        assert [cell["seed"] for cell in cells] == [0, 1]
        for key, field in (("loss", "loss"), ("accuracy", "accuracy")):
            values = [cell["final"][field] for cell in cells]
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


def test_a_cell_is_an_ordinary_run(config, finished):
    """The same rates, seed and steps in the training loop give the same losses."""
    from manifold_lora.training import loop
    from manifold_lora.training.config import TrainConfig

    content, *_ = finished
    (rate,) = content["best"]["lora"]
    fields = {f.name for f in dataclasses.fields(TrainConfig)}
    given = {k: v for k, v in vars(config).items() if k in fields}
    given |= {"method": "lora", "learning_rate": rate, "out": config.out / "../run"}
    loop.train(TrainConfig(**given), Console(file=io.StringIO()))
    rows = (config.out / "../run/metrics.jsonl").read_text().splitlines()
    losses = [r["loss"] for r in map(json.loads, rows) if "loss" in r]
    assert final(content, "lora")[0]["losses"] == pytest.approx(losses, abs=2e-5)


def test_finished_cells_are_not_run_again(config, finished, tmp_path, monkeypatch):
    content, *_ = finished
    before = (config.out / "compare.json").read_text()
    study.compare(config, console := Console(file=io.StringIO(), width=200))
    assert "finished" in console.file.getvalue()  # pyright: ignore
    assert (config.out / "compare.json").read_text() == before

    ran = []

    def run(self, rates, seed, steps, *_):
        ran.append((self.config.method, seed, steps))
        return lost

    part = {k: v for k, v in content.items() if k not in ("summary", "best")}
    part["cells"] = dict(content["cells"])
    key = next(k for k in part["cells"] if "seed 1" in k and "stiefel" in k)
    lost = part["cells"].pop(key)
    (tmp_path / "compare.json").write_text(json.dumps(part))
    monkeypatch.setattr(Runner, "run", run)
    again = study.compare(
        dataclasses.replace(config, out=tmp_path), Console(quiet=True)
    )
    assert ran == [("stiefel", 1, 6)]
    assert again["summary"] == content["summary"]


def test_other_settings_are_refused(config, finished):
    changed = dataclasses.replace(config, rank=2)
    with pytest.raises(InputError, match=r"other settings.*--overwrite"):
        study.compare(changed, Console(quiet=True))


def test_a_larger_method_gets_a_lower_rank(config, finished, monkeypatch):
    monkeypatch.setattr(study, "BUDGET", 1.01)
    changed = dataclasses.replace(config, methods=("lora", "stella"))
    made = study._Study(resolve_comparison(changed), None)  # pyright: ignore
    assert made.runner("lora").config.rank == 4
    # 2 layers: rank 4 has 2·4·64 + 2·16 parameters, over the 512 of lora
    assert made.runner("stella").config.rank == 3


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_divergence_ends_a_cell(finished, monkeypatch, name):
    *_, runners = finished
    lora, count = runners[0], itertools.count(1)

    def poisoned(*arguments):
        state, metrics = lora.compiled(*arguments)
        return state, metrics | ({name: math.nan} if next(count) == 3 else {})

    monkeypatch.setattr(lora, "step", poisoned)
    cell = lora.run(Rates(0.02), 0, 6, 3, lambda *_: None)
    assert cell["diverged"] and cell["steps"] == 3 and "final" not in cell
    assert len(cell["losses"]) == 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"methods": ("lora", "stelal")}, ["unknown method 'stelal'", "stella"]),
        ({"methods": ()}, ["at least one method"]),
        ({"learning_rates": ("fast",)}, ["positive numbers or auto, got fast"]),
        ({"learning_rates": ("auto", "1")}, ["got auto"]),
        ({"seeds": 0}, ["--seeds must be at least 1"]),
        ({"search_steps": 0}, ["--search-steps must be at least 1"]),
        ({"learning_rate": 1.0}, ["learning_rate has no place in a comparison"]),
        ({"diagonal_s": True}, ["no method of the comparison takes diagonal_s=True"]),
        ({"start": "svd_major"}, ["takes start=svd_major"]),
    ],
)
def test_bad_settings(config, changes, words):
    with pytest.raises(InputError) as caught:
        resolve_comparison(dataclasses.replace(config, **changes))
    for word in words:
        assert word in str(caught.value)


def test_options_go_to_the_methods_that_have_them(config):
    plan = resolve_comparison(
        dataclasses.replace(
            config, methods=("lora stella", "loram_br"), diagonal_s=True, start="zero"
        )
    )
    settings = {n: (run.diagonal_s, run.start) for n, run in plan.runs.items()}
    assert settings == {
        "lora": (False, "kaiming"),
        "stella": (True, "zero"),
        "loram_br": (False, "zero"),
    }
    assert plan.baseline == "lora"


def test_grids_are_the_papers_or_those_of_the_built_in_base():
    given = CompareConfig(methods=("stella",), model="somewhere")  # pyright: ignore
    assert resolve_comparison(given).grids["stella"] == (2e-4, 5e-4, 1e-3)
    builtin = resolve_comparison(CompareConfig(methods=("stella",)))
    assert builtin.grids["stella"] == pytest.approx((5e-3 / 3, 5e-3, 15e-3))
    assert builtin.baseline == "stella"


def test_the_command_reads_a_file(config, tmp_path, capsys):
    file = tmp_path / "c.toml"
    file.write_text('methods = ["lora"]\nseedz = 2\n')
    with pytest.raises(SystemExit) as stopped:
        main(["compare", "--config", str(file)])
    assert stopped.value.code == 2 and "Did you mean seed" in capsys.readouterr().err
    file.write_text('methods = ["lora"]\nseeds = 0\n')
    with pytest.raises(SystemExit) as stopped:
        main(["compare", "--config", str(file)])
    assert stopped.value.code == 2 and "--seeds" in capsys.readouterr().err
