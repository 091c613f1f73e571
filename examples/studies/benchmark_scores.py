"""Score a base and its adapters on the held-out files of `benchmark_base.py`.

Run from the root of the repository, with its DIR and the adapters of a comparison:

    python -m examples.studies.benchmark_scores COMPARE_DIR --base DIR/base --tests DIR

Every adapter in PEFT's format below these directories is scored:

- answer NLL: mean negative log-likelihood per token of the true answers in
  `commonsense_test.jsonl`, including the end of sequence, in nats;
- accuracy: fraction of questions for which the label with the most likely answer,
  without the end of sequence, is the true one; per task, and averaged over tasks.
  Baselines are chance and the best constant label of each task. With 400 questions, the
  standard error of an accuracy is 2.2 points (2.5 for two labels);
- E2E loss: mean negative log-likelihood per token of the references in
  `e2e_test.jsonl`.

Prints a table and writes all scores to `scores.json`. For directories named
METHOD-seedN, the table has mean ± standard deviation over the seeds of a method.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from rich.progress import track

import manifold_lora as ml
from manifold_lora.data.batches import Batch, evaluation_batches
from manifold_lora.data.records import Record, read_records
from manifold_lora.data.tokens import Example, encode, load_tokenizer
from manifold_lora.evaluation.heldout import make_evaluate

ANSWER = "the correct answer is {}"
WIDTHS = (64, 80, 96, 112, 128, 160, 192, 256, 512)  # row lengths, compiled once each
ROWS = 16  # per batch
Scores = dict[str, float]


class Question(NamedTuple):
    """One test question."""

    task: str
    labels: list[str]
    truth: int  # index into the labels


class Choice(NamedTuple):
    """A row of tokens shared by labels of a question whose last tokens differ."""

    question: int
    tokens: dict[int, int]  # the last token of the answer, by label index
    example: Example  # with the true label, if it is one of them


def read_questions(file: Path, tokenizer: Any, length: int):
    """The questions of a file, and the rows to score.

    The answers to a question mostly differ only in their last token. Then one row gives
    the probabilities of all of them.
    """
    questions, choices = list[Question](), list[Choice]()
    records, owners = list[Record](), list[tuple[int, int]]()
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        labels = row["prompt"].split("Answer format: ")[-1].strip().split("/")
        owners += [(len(questions), label) for label in range(len(labels))]
        records += [Record((), row["prompt"], ANSWER.format(label)) for label in labels]
        questions.append(Question(row["task"], labels, labels.index(row["answer"])))
    grouped = defaultdict[tuple[int, bytes], dict[int, Example]](dict)
    examples, _ = encode(records, tokenizer, length)
    for (owner, label), example in zip(owners, examples, strict=True):
        stem = example.input_ids[:-2]  # without the last token and the end of sequence
        grouped[owner, stem.tobytes()][label] = example
    for (owner, _), group in grouped.items():
        example = group.get(questions[owner].truth) or next(iter(group.values()))
        tokens = {label: int(one.input_ids[-2]) for label, one in group.items()}
        choices.append(Choice(owner, tokens, example))
    return questions, choices


def buckets(examples: list[Example]) -> Iterator[tuple[list[int], Batch]]:
    """Batches of similar length, with few shapes, and the indices of their examples."""
    by_width = defaultdict[int, list[int]](list)
    for number, example in enumerate(examples):
        by_width[next(w for w in WIDTHS if w >= len(example.input_ids))].append(number)
    for width, numbers in by_width.items():
        rows = [examples[number] for number in numbers]
        batches = evaluation_batches(rows, batch_size=ROWS, sequence_length=width)
        for start, batch in zip(range(0, len(rows), ROWS), batches, strict=True):
            yield numbers[start : start + ROWS], batch


@partial(jax.jit, static_argnums=(0, 3))
def answer_log_p(graph: nnx.GraphDef, state: nnx.State, batch: Batch, window: int):
    """Log p of the last `window` tokens of each row, and of all other tokens there.

    Shapes (rows, window) and (rows, window, vocabulary). Logits are only computed for
    the window.
    """
    model, ids = nnx.merge(graph, state), jnp.asarray(batch["input_ids"])
    places = {key: batch[key] for key in ("positions", "segment_ids")}
    hidden = model.hidden_states(ids, **places)
    size = batch["segment_ids"].sum(axis=1, keepdims=True)
    place = jnp.maximum(size - window + jnp.arange(window), 1)  # (rows, window)
    before = jnp.take_along_axis(hidden, place[..., None] - 1, axis=1)
    log_p = jax.nn.log_softmax(model.unembed(before).astype(jnp.float32))
    tokens = jnp.take_along_axis(ids, place, axis=1)[..., None]
    return jnp.take_along_axis(log_p, tokens, axis=2)[..., 0], log_p


class Benchmark:
    """The test files, encoded once for all adapters."""

    def __init__(self, tests: Path, base: ml.Llama, tokenizer: Any, length: int):
        questions = tests / "commonsense_test.jsonl"
        self.questions, self.choices = read_questions(questions, tokenizer, length)
        examples = [choice.example for choice in self.choices]
        self.window = max(int(example.loss_mask.sum()) for example in examples)
        self.question_batches = list(buckets(examples))
        records = read_records(tests / "e2e_test.jsonl")
        references, _ = encode(records, tokenizer, length)
        self.e2e_batches = [batch for _, batch in buckets(references)]
        self.graph = nnx.graphdef(base)
        self.evaluate = make_evaluate(lambda _, base: nnx.merge(self.graph, base), {})

    def scores(self, model: ml.Llama) -> Scores:
        """All scores of the base, or of the base with an adapter merged into it."""
        state = nnx.state(model)
        log_p = [np.full(len(question.labels), np.nan) for question in self.questions]
        truths: list[np.ndarray] = []
        for numbers, batch in self.question_batches:
            outputs = answer_log_p(self.graph, state, batch, self.window)
            true_log_p, all_log_p = map(np.asarray, outputs)
            for row, number in enumerate(numbers):
                choice = self.choices[number]
                answer = true_log_p[row, -int(choice.example.loss_mask.sum()) :]
                before = answer[
                    :-2
                ].sum()  # the last two are the label and the end of sequence
                for label, token in choice.tokens.items():
                    log_p[choice.question][label] = before + all_log_p[row, -2, token]
                if self.questions[choice.question].truth in choice.tokens:
                    truths.append(answer)
        pairs = zip(self.questions, log_p, strict=True)
        hits = [int(scores.argmax()) == question.truth for question, scores in pairs]
        losses = {
            "answer NLL": -np.mean(np.concatenate(truths), dtype=np.float64).item(),
            "E2E loss": self.evaluate({}, state, self.e2e_batches).loss,
        }
        return self.by_task(hits) | losses

    def constant(self) -> dict[str, Scores]:
        """Accuracies of chance, and of the best constant label."""
        truths = [(task, labels[truth]) for task, labels, truth in self.questions]
        rarest_first = reversed(Counter(truths).most_common())
        best = {task: label for (task, label), _ in rarest_first}
        chances = [1 / len(question.labels) for question in self.questions]
        majority = [label == best[task] for task, label in truths]
        return {"chance": self.by_task(chances), "majority": self.by_task(majority)}

    def by_task(self, values: Sequence[float]) -> Scores:
        """Means of a value per question over each task, and their unweighted mean."""
        grouped = defaultdict[str, list[float]](list)
        for question, value in zip(self.questions, values, strict=True):
            grouped[question.task].append(value)
        means = {task: np.mean(each).item() for task, each in grouped.items()}
        return means | {"mean": np.mean(list(means.values())).item()}


def find_adapters(runs: list[Path]) -> dict[str, Path]:
    """The adapters below the directories, by their names or those of their runs."""
    adapters = {}
    for file in (file for run in runs for file in run.rglob("adapter_config.json")):
        path = file.parent.resolve()
        name = path.parent.name if path.name == "adapter" else path.name
        if name == "start":  # of a run: the initial adapter
            continue
        if adapters.setdefault(name, path) != path:
            raise SystemExit(
                f"Two adapters are named {name}: {adapters[name]}, {path}."
            )
    return dict(sorted(adapters.items()))


def by_method(adapters: dict[str, Scores]) -> dict[str, Any]:
    """Means over the seeds of each method, with standard deviations if several."""
    groups = defaultdict[str, list[Scores]](list)
    for name, scores in adapters.items():
        groups[re.sub(r"-seed\d+$", "", name)].append(scores)
    summary = defaultdict[str, dict[str, list[float]]](dict)
    for method, runs in groups.items():
        for key in runs[0]:
            values = [run[key] for run in runs]
            std = [np.std(values, ddof=1).item()] if len(runs) > 1 else []
            summary[method][key] = [np.mean(values).item(), *std]
    return summary


def show(result: dict[str, Any]) -> None:
    """Print a Markdown table: accuracies in percent, losses in nats per token."""
    keys = list(result["base"])
    print(f"| | {' | '.join(keys)} |\n{'|---' * (len(keys) + 1)}|")
    rows = {name: result[name] for name in ("chance", "majority", "base")}
    for name, row in (rows | result["methods"]).items():
        cells = [name]
        for key in keys:
            factor, digits = (1, 3) if key in ("answer NLL", "E2E loss") else (100, 1)
            numbers = np.atleast_1d(row.get(key, [])) * factor
            cells.append(" ± ".join(f"{x:.{digits}f}" for x in numbers) or "–")
        print(f"| {' | '.join(cells)} |")


def main(
    runs: tyro.conf.Positional[list[Path]],
    base: Path,
    tests: Path,
    out: Path = Path("scores.json"),
    length: int = 256,
) -> None:
    """Score a base model and its adapters.

    Args:
        runs: Directories with adapters, at any depth.
        base: Directory of the base model.
        tests: Directory of commonsense_test.jsonl and e2e_test.jsonl.
        out: Output JSON file.
        length: Maximum length of an example, up to 512; longer prompts are truncated.
    """
    paths = find_adapters(runs)
    model = ml.load_llama(base, jnp.float32)
    benchmark = Benchmark(tests, model, load_tokenizer(base), length)
    result: dict[str, Any] = benchmark.constant() | {"base": benchmark.scores(model)}
    adapters = dict[str, Scores]()
    for name, path in track(paths.items(), "scoring"):
        adapted = nnx.clone(model)
        ml.load_adapter(adapted, path)
        ml.merge(adapted)  # same graph for all methods: nothing is recompiled
        adapters[name] = benchmark.scores(adapted)
    result |= {"adapters": adapters, "methods": by_method(adapters)}
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    show(result)


if __name__ == "__main__":
    tyro.cli(main)
