"""The command: any data file, the commonsense protocol, and resuming."""

import json
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import manifold_lora as ml
from manifold_lora.configuration.flat import Source, compose
from manifold_lora.configuration.parts import BaseConfig
from manifold_lora.data.records import read_records
from manifold_lora.data.tokens import encode, load_tokenizer
from manifold_lora.evaluation.commonsense import Commonsense
from manifold_lora.evaluation.config import EvaluateConfig
from manifold_lora.evaluation.data_files import DataFiles
from manifold_lora.evaluation.templates import TEMPLATES
from manifold_lora.generation.model import adapted, load_base
from manifold_lora.settings import flag
from tests.cases import slow_but
from tests.evaluation import cases
from tests.tiny import data_file
from tests.tolerances import FLOAT32

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return cases.model_with_adapter(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cases.task_directory(tmp_path_factory.mktemp("tasks"))


def config(**settings: Any) -> EvaluateConfig:
    return compose(EvaluateConfig, Source(settings, flag))


# The same in all tests, so that their programs are compiled once.
GENERATED = {"protocol": "stella", "beams": 1, "max_new_tokens": 2, "batch_size": 2}


def read(out: Path) -> list[dict[str, Any]]:
    lines = (out / "predictions.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def without_time(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_time(v) for k, v in value.items() if k != "seconds"}
    return [without_time(v) for v in value] if isinstance(value, list) else value


def test_a_data_file_is_measured_as_numpy_does(models, tmp_path: Path):
    file = data_file(tmp_path / "data.jsonl", 9)
    summary = ml.evaluate(
        config(model=models[0], data=file, batch_size=2, out=tmp_path / "out")
    )
    examples, _ = encode(read_records(file), load_tokenizer(models[0]), 512)
    nll, hits, exact = [], [], []
    for example in examples:
        scores = cases.log_probabilities(models[0], example.input_ids)
        places = np.flatnonzero(example.answer_mask)
        true = example.input_ids[places]
        nll += (-scores[places - 1, true]).tolist()
        hit = scores[places - 1].argmax(-1) == true
        hits += hit.tolist()
        exact.append(hit.all())
    found = summary["systems"]["base"]["tasks"][file.name]
    assert found["loss"] == pytest.approx(np.mean(nll), rel=FLOAT32)
    assert found["perplexity"] == pytest.approx(np.exp(np.mean(nll)), rel=1e-4)
    assert found["token_accuracy"] == np.mean(hits)
    assert found["exact_match"] == np.mean(exact)
    rows = sorted(read(tmp_path / "out"), key=lambda row: row["record"])
    for row, example in zip(rows, examples, strict=True):
        assert row["tokens"] == example.answer_mask.sum()
    assert summary["records"] == {file.name: 9}
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text()) == summary


def test_commonsense_of_a_base_and_an_adapter(models, tasks: Path, tmp_path: Path):
    out = tmp_path / "out"
    given = {"model": models[0], "tasks": tasks, "out": out} | GENERATED
    summary = ml.evaluate(config(**given, adapter=models[1]))
    rows = read(out)
    assert len(rows) == 2 * 8
    systems = summary["systems"]
    name = str(models[1])
    assert list(systems) == ["base", name]
    for system, measures in systems.items():
        mine = [row for row in rows if row["system"] == system]
        means = {"accuracy": "correct", "unparsed": "unparsed"}
        means["likelihood_accuracy"] = "likely_correct"
        for measure, key in means.items():
            by_task = [
                np.mean([row[key] for row in mine if row["task"] == task])
                for task in ("boolq", "piqa")
            ]
            assert measures["tasks"]["boolq"][measure] == pytest.approx(by_task[0])
            assert measures["tasks"]["piqa"][measure] == pytest.approx(by_task[1])
            mean = measures["tasks"]["mean"][measure]
            assert mean == pytest.approx(np.mean(by_task))  # not weighted by records
    change = summary["differences"]["of"][name]["mean"]["likelihood_accuracy"]
    after, before = (systems[x]["tasks"]["mean"] for x in (name, "base"))
    needed = after["likelihood_accuracy"] - before["likelihood_accuracy"]
    assert change["value"] == pytest.approx(needed)
    assert change["low"] <= change["value"] <= change["high"]
    check_likelihoods(models[0], [row for row in rows if row["system"] == "base"])
    table = (out / "table.md").read_text().splitlines()
    assert table[0].startswith(f"| task | records | measure | base | {name} |")


def check_likelihoods(model: Path, rows: list[dict[str, Any]]) -> None:
    """The log-probabilities of whole texts differ as those of the labels do."""
    tokenizer = load_tokenizer(model)
    labels = {"boolq": ("true", "false"), "piqa": ("solution1", "solution2")}
    formats = {task: "/".join(names) for task, names in labels.items()}
    texts = {"boolq": cases.BOOLQ, "piqa": cases.PIQA}
    for row in rows:
        question = texts[row["task"]][row["record"]][0]
        prompt = TEMPLATES["stella"].prompt(
            cases.instruction(question, formats[row["task"]])
        )
        totals = []
        for label in labels[row["task"]]:
            ids: Any = tokenizer(f"{prompt}the correct answer is {label}")["input_ids"]
            scores = cases.log_probabilities(model, ids)
            totals.append(scores[np.arange(len(ids) - 1), ids[1:]].sum())
        first, second = row["logprobs"].values()
        assert first - second == pytest.approx(totals[0] - totals[1], abs=2e-4)
        assert row["likely"] == labels[row["task"]][int(np.argmax(totals))]


@pytest.mark.slow
@pytest.mark.mesh
def test_scores_do_not_depend_on_the_mesh(models, tasks, tmp_path: Path):
    given = {"model": models[0], "adapter": models[1], "tasks": tasks, "base": False}
    given |= GENERATED | {"examples": 2}
    logprobs = []
    for mesh in ("data=8", "data=2,fsdp=2,tensor=2"):
        out = tmp_path / mesh
        ml.evaluate(config(**given, mesh=mesh, out=out))
        rows = sorted(read(out), key=lambda row: (row["task"], row["record"]))
        logprobs.append([[*row["logprobs"].values()] for row in rows])
    np.testing.assert_allclose(logprobs[0], logprobs[1], rtol=FLOAT32)


def test_a_killed_evaluation_resumes_with_the_same_numbers(
    models, tasks: Path, tmp_path: Path, monkeypatch
):
    given = {"model": models[0], "adapter": models[1], "tasks": tasks} | GENERATED
    whole = ml.evaluate(config(**given, out=tmp_path / "whole"))
    part = config(**given, out=tmp_path / "part")
    calls = []
    original = Commonsense._row

    def killed(self, *arguments):
        calls.append(arguments)
        if len(calls) == 12:  # in the middle of a batch of the adapter
            raise KeyboardInterrupt
        return original(self, *arguments)

    monkeypatch.setattr(Commonsense, "_row", killed)
    with pytest.raises(KeyboardInterrupt):
        ml.evaluate(part)
    assert not (tmp_path / "part" / "evaluation.json").exists()
    done = len(read(tmp_path / "part"))
    assert 8 < done < 12
    with (tmp_path / "part" / "predictions.jsonl").open("a") as file:
        file.write('{"system": "base", "ta')  # cut by the kill
    calls.clear()
    monkeypatch.setattr(Commonsense, "_row", original)
    assert without_time(ml.evaluate(part)) == without_time(whole)
    first, second = (
        sorted(without_time(read(tmp_path / name)), key=str)
        for name in ("whole", "part")
    )
    assert first == second
    # Finished, it runs nothing again.
    monkeypatch.setattr(Commonsense, "predict", None)
    assert without_time(ml.evaluate(part)) == without_time(whole)


@pytest.mark.parametrize(
    ("change", "message"),
    slow_but(
        [({"weights": True}, "the weights of .* changed")],
        [
            ({"beams": 2}, "beams was 1, is 2"),
            ({"protocol": "llm-adapters"}, "protocol was stella, is llm-adapters"),
            ({"records": True}, "the records changed"),
            ({"weights": True}, "the weights of .* changed"),
        ],
    ),
)
def test_other_settings_do_not_continue(
    tmp_path: Path, change: dict[str, Any], message: str
):
    model, adapter = cases.model_with_adapter(tmp_path)
    given = {"model": model, "adapter": adapter} | GENERATED
    mine = cases.task_directory(tmp_path / "tasks")
    given |= {"tasks": mine, "examples": 1, "out": tmp_path / "out", "base": False}
    change = dict(change)
    ml.evaluate(config(**given))
    if change.pop("records", False):
        file = mine / "boolq" / "test.json"
        file.write_text(file.read_text().replace("ice", "snow"))
    if change.pop("weights", False):
        os.remove(adapter / "manifold_lora.json")
    with pytest.raises(ml.InputError, match=message):
        ml.evaluate(config(**given | change))
    if "beams" not in change:  # nor is a search compiled for it
        ml.evaluate(config(**given | change, overwrite=True))


def test_another_adapter_joins_a_finished_evaluation(
    models, tmp_path: Path, monkeypatch
):
    file = data_file(tmp_path / "data.jsonl", 6)
    given = {"model": models[0], "data": file, "out": tmp_path / "out"}
    alone = ml.evaluate(config(**given))
    systems = []
    predict = DataFiles.predict

    def recorded(self, system, *arguments):
        systems.append(system)
        return predict(self, system, *arguments)

    monkeypatch.setattr(DataFiles, "predict", recorded)
    both = ml.evaluate(config(**given, adapter=models[1]))
    assert len(systems) == 1
    assert both["systems"]["base"] == alone["systems"]["base"]
    name = str(models[1])
    change = both["differences"]["of"][name][file.name]["loss"]
    losses = [both["systems"][x]["tasks"][file.name]["loss"] for x in (name, "base")]
    assert change["value"] == pytest.approx(losses[0] - losses[1])
    changed = (tmp_path / "out" / "changed.jsonl").read_text().splitlines()
    exact = {
        x: [row["exact"] for row in read(tmp_path / "out") if row["system"] == x]
        for x in ("base", name)
    }
    assert len(changed) == np.sum(np.array(exact["base"]) != exact[name])


def test_an_adapter_leaves_the_base_as_it_was(models):
    base = load_base(BaseConfig(models[0]))
    ids = jnp.arange(2, 20)[None]
    before = np.asarray(base(ids))
    with adapted(base, models[1]):
        assert np.abs(np.asarray(base(ids)) - before).max() > 0.1
    np.testing.assert_array_equal(np.asarray(base(ids)), before)


def test_answers_that_are_no_labels_are_refused(models, tmp_path: Path):
    tasks = cases.task_directory(tmp_path / "tasks")
    file = tasks / "piqa" / "test.json"
    file.write_text(file.read_text().replace('"answer": "solution1"', '"answer": "a"'))
    message = r"piqa/test.json, record 2: the answer 'a' is none of solution1, solu"
    with pytest.raises(ml.InputError, match=message):
        ml.evaluate(config(model=models[0], tasks=tasks, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_prompts_beyond_the_context_are_refused(models, tasks: Path, tmp_path: Path):
    given = {"model": models[0], "tasks": tasks, "out": tmp_path / "out"}
    message = r"boolq/test.json, record 1: the prompt has \d+ tokens(.|\n)*room for 48"
    with pytest.raises(ml.InputError, match=message):
        ml.evaluate(config(**given, max_new_tokens=2000))


def test_directories_without_tasks_are_refused(models, tmp_path: Path):
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "test.json").write_text("[]")
    with pytest.raises(ml.InputError, match="none of the tasks"):
        ml.evaluate(config(model=models[0], tasks=tmp_path))
    cases.task_directory(tmp_path)
    from manifold_lora.evaluation.commonsense import find_tasks

    files, notes = find_tasks(tmp_path)
    assert list(files) == ["boolq", "piqa"]
    assert notes == ("not a commonsense task, left out: gsm8k",)
