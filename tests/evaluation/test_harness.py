"""lm-evaluation-harness: our model against NumPy, and against the harness' own `hf`."""

# pyright: reportMissingImports=false
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import manifold_lora as ml
from manifold_lora import MergeConfig, merge_files
from manifold_lora.adapters import AdapterConfig, attach
from manifold_lora.checkpoints.huggingface import load_llama
from manifold_lora.checkpoints.peft import save_adapter
from manifold_lora.data.tokens import load_tokenizer
from tests import smollm2
from tests.evaluation.cases import BOOLQ, log_probabilities, model_with_adapter
from tests.tolerances import FLOAT32

pytestmark = [
    pytest.mark.usefixtures("quick_compilation"),
    pytest.mark.filterwarnings("ignore"),  # of the harness and of datasets
]

TASKS = {
    "choice": """
output_type: multiple_choice
doc_to_text: "Question: {{question}} Answer:"
doc_to_choice: ["true", "not so", "false"]
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "text": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}} {{answer}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}]
""",
    "answers": """
output_type: generate_until
doc_to_text: "Question: {{question}} Answer:"
doc_to_target: "{{answer}}"
generation_kwargs: {until: [".", "e"], max_gen_toks: 9, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """Files of three tasks that need no network."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"question": text, "answer": answer} for text, answer in BOOLQ]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in TASKS.items():
        head = f"""task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {tmp_path / "cache"}}}
test_split: test
num_fewshot: 0
"""
        (folder / f"{name}.yaml").write_text(head + text)
    return folder


def run(
    tasks: Path, model: str, names: Sequence[str] = tuple(TASKS), **arguments: Any
) -> dict[str, Any]:
    """The scores, and the answers of the model to every request, by task."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    from manifold_lora.evaluation import harness

    assert harness.ManifoldLoraLM
    found = lm_eval.simple_evaluate(
        model=model,
        model_args=arguments,
        batch_size=2,
        tasks=list(names),
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
    )
    answers = {
        task: [response for sample in samples for response in sample["resps"]]
        for task, samples in found["samples"].items()
    }
    return {"scores": found["results"], "answers": answers}


def test_scores_are_those_of_numpy(tasks: Path, tmp_path: Path):
    path, adapter = model_with_adapter(tmp_path)
    found = run(tasks, "manifold_lora", pretrained=str(path))
    tokenizer = load_tokenizer(path)
    given = iter(found["answers"]["choice"])
    for text, _ in BOOLQ:
        context: Any = tokenizer(f"Question: {text} Answer:")["input_ids"]
        for label in ("true", "not so", "false"):
            ids: Any = tokenizer(f"Question: {text} Answer: {label}")["input_ids"]
            scores = log_probabilities(path, ids)[len(context) - 1 :]
            needed = scores[np.arange(len(scores)), ids[len(context) :]].sum()
            assert next(given)[0][0] == pytest.approx(needed, rel=FLOAT32)
    for (text, answer), given in zip(BOOLQ, found["answers"]["text"], strict=True):
        ids = tokenizer(f"{text} {answer}")["input_ids"]
        ids = [tokenizer.bos_token_id, *ids]
        needed = log_probabilities(path, ids)[np.arange(len(ids) - 1), ids[1:]].sum()
        assert given[0] == pytest.approx(needed, rel=FLOAT32)
    assert all(len(given[0]) <= 9 for given in found["answers"]["answers"])
    other = run(tasks, "manifold_lora", pretrained=str(path), adapter=str(adapter))
    assert other["answers"]["choice"] != found["answers"]["choice"]


def test_windows_of_the_context(tasks: Path, tmp_path: Path):
    """A text longer than the context is scored in windows, each token once."""
    pytest.importorskip("lm_eval")
    from manifold_lora.evaluation import harness

    path, _ = model_with_adapter(tmp_path)
    make: Any = harness.ManifoldLoraLM  # which the harness' decorator calls an LM
    model = make(str(path), max_length=16, batch_size=2)

    class Request:
        args = ("abcdefghijklmnopqrstuvwxyz",)

    (found,) = model.loglikelihood_rolling([Request()])
    ids = [0, *model.tok_encode(Request.args[0])]
    first = log_probabilities(path, ids[:17])[np.arange(16), ids[1:17]].sum()
    second = log_probabilities(path, ids[10:])[np.arange(6, 16), ids[17:]].sum()
    assert len(ids) == 27
    assert found == pytest.approx(first + second, rel=FLOAT32)


def test_settings_that_we_do_not_have_are_named(tmp_path: Path):
    pytest.importorskip("lm_eval")
    from manifold_lora.evaluation import harness

    make: Any = harness.ManifoldLoraLM
    _options = harness._options

    with pytest.raises(ml.InputError, match="penalty_alpha, which manifold_lora"):
        _options({"penalty_alpha": 0.6})
    assert _options({"do_sample": True, "top_p": 0.9}) == {
        "temperature": 1.0,
        "top_p": 0.9,
        "max_new_tokens": 256,
    }
    assert _options({"temperature": 0.7}) == {"max_new_tokens": 256}  # as hf has it
    with pytest.raises(ml.InputError, match=r"unknown arguments .*\['peft'\]"):
        make(str(tmp_path), peft="x")


def compare(tasks: Path, path: Path) -> dict[str, Any]:
    """Compare a model of ours with the harness' own; returns the answers of that."""
    pytest.importorskip("torch")
    ours = run(tasks, "manifold_lora", pretrained=str(path), dtype="float32")
    theirs = run(tasks, "hf", pretrained=str(path), dtype="float32", device="cpu")
    for task, answers in theirs["answers"].items():
        for one, other in zip(ours["answers"][task], answers, strict=True):
            if task == "choice":
                assert one[0][0] == pytest.approx(other[0][0], rel=FLOAT32)
                assert one[0][1] == other[0][1]
            elif task == "text":
                assert one[0] == pytest.approx(other[0], rel=FLOAT32)
            else:
                assert one == other
    for task, scores in theirs["scores"].items():
        for measure, score in scores.items():
            if isinstance(score, float):
                found = ours["scores"][task][measure]
                assert found == pytest.approx(score, rel=1e-4), (task, measure)
    return theirs["answers"]


@pytest.mark.hf
@pytest.mark.timeout(600)
def test_scores_are_those_of_hf(tasks: Path, tmp_path: Path):
    path, _ = model_with_adapter(tmp_path)
    compare(tasks, path)


@pytest.mark.hf
@pytest.mark.real
@pytest.mark.timeout(1200)
def test_scores_of_a_real_merged_model_are_those_of_hf(tasks: Path, tmp_path: Path):
    base, adapter, merged = smollm2.directory(), tmp_path / "a", tmp_path / "merged"
    attach(model := load_llama(base), AdapterConfig("stella", rank=4))
    save_adapter(model, adapter)
    del model
    config = MergeConfig(
        model=base, adapters=(str(adapter),), out=merged, dtype="float32"
    )
    merge_files(config)
    theirs = compare(tasks, merged)
    names, ours = ("choice", "answers"), {"pretrained": str(base)}
    found = run(tasks, "manifold_lora", names, adapter=str(adapter), **ours)["answers"]
    for one, other in zip(found["choice"], theirs["choice"], strict=True):
        assert one[0][0] == pytest.approx(other[0][0], rel=1e-4)
        assert one[0][1] == other[0][1]
    assert found["answers"] == theirs["answers"]
    plain = run(tasks, "manifold_lora", names[:1], **ours)["answers"]["choice"]
    assert plain[0][0][0] != pytest.approx(theirs["choice"][0][0][0], rel=1e-2)
