"""Any data file: loss, token accuracy and exact match of the answers."""

import hashlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from manifold_lora.data.builtin import builtin_records
from manifold_lora.data.files import find_files
from manifold_lora.data.records import Record, read_files
from manifold_lora.data.tokens import Example, check_ids, encode
from manifold_lora.errors import InputError
from manifold_lora.evaluation.batches import HeldOutBatches
from manifold_lora.evaluation.config import EvaluateConfig
from manifold_lora.evaluation.heldout import (
    Evaluation,
    evaluation_sums,
    first_turn,
    row_sums,
)
from manifold_lora.evaluation.measures import Measure, Row
from manifold_lora.evaluation.suite import Suite, by_name
from manifold_lora.evaluation.systems import System
from manifold_lora.models import LlamaConfig


class DataFiles(Suite):
    """Records of any format that `train` reads, with its templates and masks.

    Answers are measured given the true tokens before each of their tokens, which needs
    no generation.
    """

    measures = (
        Measure("loss", "nll", per="tokens"),
        Measure("token_accuracy", "correct", per="tokens"),
        Measure("exact_match", "exact"),
    )

    def __init__(self, config: EvaluateConfig, tokenizer: Any, shape: LlamaConfig):
        self._tokenizer, self._length = tokenizer, config.sequence_length
        self._rows = config.batch_size
        self.examples: dict[str, list[Example]] = {}
        notes: list[str] = []
        for name, records, skipped in _read(config):
            examples, report = encode(
                records[: config.examples],
                tokenizer,
                self._length,
                date=config.date,
                skip_invalid=config.skip_invalid,
            )
            check_ids(examples, shape.vocab_size, tokenizer)
            self.examples[name] = examples
            if left_out := (*skipped, *report.invalid):
                notes.append(f"{len(left_out):,} records left out: {left_out[0]}")
            if report.truncated:
                notes.append(
                    f"{name}: {report.truncated:,} records truncated to {self._length} "
                    f"tokens (longest {report.longest:,})"
                )
            longest = max(len(example.input_ids) for example in examples)
            if warning := shape.length_warning(longest):
                notes.append(f"{name}: {warning}")
        self.notes = tuple(notes)
        self.sizes = {name: len(found) for name, found in self.examples.items()}
        digest = hashlib.sha256()
        for example in sum(self.examples.values(), []):
            mask = example.answer_mask.tobytes()
            digest.update(example.input_ids.tobytes() + mask)
        self.digest = digest.hexdigest()[:16]

    def predict(self, system: System, task: str, done: set[int]) -> Iterator[list[Row]]:
        """See `Suite`. All batches are run again if any is missing: it is quick."""
        examples = self.examples[task]
        if done.issuperset(range(len(examples))):
            return
        longest = max(len(example.input_ids) for example in examples)
        batches = HeldOutBatches(examples, self._rows * longest, self._length)
        records = iter(batches.order)
        sums = evaluation_sums(system.rebuild, system.axes)
        started = time.perf_counter()
        for rows in row_sums(sums, system.factors, system.frozen, batches):
            now = time.perf_counter()
            seconds = round((now - started) / int(rows[:, 3].sum()), 4)
            started = now
            yield [
                {
                    "record": next(records),
                    "nll": nll,
                    "tokens": int(tokens),
                    "correct": int(correct),
                    "exact": int(exact),
                    "seconds": seconds,
                }
                for nll, tokens, correct, has_answer, exact in rows.tolist()
                if has_answer  # the others are padding
            ]

    def summarise(self, rows: Sequence[Row]) -> dict[str, float]:
        """See `Suite`; with the perplexity."""
        measures = super().summarise(rows)
        perplexity = Evaluation(measures["loss"], 0, 0).perplexity
        return {"loss": measures.pop("loss"), "perplexity": perplexity, **measures}

    def describe(self, task: str, row: Row) -> tuple[str, str, str]:
        """See `Suite`."""
        example = self.examples[task][row["record"]]
        prompt, true = (
            " ".join(self._tokenizer.decode(ids, skip_special_tokens=True).split())
            for ids in first_turn(example)
        )
        right = f"{row['correct']} of {row['tokens']} tokens"
        return prompt, f"loss {row['nll'] / row['tokens']:.3f}, {right}", true

    def outcome(self, row: Row) -> Any:
        """See `Suite`."""
        return row["exact"]


def _read(config: EvaluateConfig) -> Iterator[tuple[str, list[Record], Sequence[str]]]:
    """The name of each file, its records, and the reasons why others are left out."""
    if not config.data:
        yield "built-in", builtin_records()[1], ()
    files = [file for path in config.data for file in _files(path)]
    for name, file in by_name(files).items():
        read = read_files([file], skip_invalid=config.skip_invalid)
        yield name, read.records, read.skipped


def _files(path: Path) -> list[Path]:
    """A file, or those of a directory that are there to test or validate on."""
    if not path.is_dir():
        return [path]
    parts = find_files([path])
    if files := parts.test or parts.valid:
        return files
    raise InputError(
        f"--data {path} has no file to test or validate on, such as test.jsonl: give "
        "the files to evaluate on."
    )
