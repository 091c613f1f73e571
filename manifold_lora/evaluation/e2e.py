"""The E2E benchmark: sentences for meaning representations, by BLEU and chrF."""

# pyright: reportMissingImports=false
import hashlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from manifold_lora.errors import InputError
from manifold_lora.evaluation.bootstrap import Difference, paired_bootstrap
from manifold_lora.evaluation.config import EvaluateConfig
from manifold_lora.evaluation.measures import Row
from manifold_lora.evaluation.prompts import check_lengths
from manifold_lora.evaluation.suite import Suite, batched, by_name
from manifold_lora.evaluation.systems import System
from manifold_lora.models import LlamaConfig

BARS = "||"  # between a meaning representation and a sentence


class E2E(Suite):
    """Files of lines `name : Alimentum | area : city centre||A sentence .`.

    A model continues the line after the bars: train it on records whose prompt ends
    with them and whose completion is the sentence. All sentences of one meaning
    representation are its references (Novikova et al., The E2E Dataset, 2017).

    Raises:
        InputError: sacrebleu is not installed, a line is not of this form, or a prompt
            is longer than the context.
    """

    def __init__(self, config: EvaluateConfig, tokenizer: Any, shape: LlamaConfig):
        self._config, self._tokenizer = config, tokenizer
        self._metrics = _metrics()
        self.references: dict[str, dict[str, list[str]]] = {}
        self._prompts: dict[str, list[list[int]]] = {}
        for task, file in by_name(config.data).items():
            found = list(read_e2e(file).items())[: config.examples]
            self.references[task] = dict(found)
            prompts = [tokenizer(meaning + BARS)["input_ids"] for meaning, _ in found]
            check_lengths(str(file), prompts, shape, config.max_new_tokens)
            self._prompts[task] = prompts
        self.sizes = {name: len(found) for name, found in self.references.items()}
        text = msgspec.json.encode([self.references, self._prompts])
        self.digest = hashlib.sha256(text).hexdigest()[:16]

    def predict(self, system: System, task: str, done: set[int]) -> Iterator[list[Row]]:
        """See `Suite`."""
        config, prompts = self._config, self._prompts[task]
        meanings = list(self.references[task])
        for batch in batched(list(map(len, prompts)), config.batch_size, done):
            started = time.perf_counter()
            responses = system.generate(
                [prompts[i] for i in batch], **config.generation
            )
            seconds = round((time.perf_counter() - started) / len(batch), 4)
            texts = [
                self._tokenizer.decode(ids, skip_special_tokens=True)
                for ids in responses
            ]
            yield [
                {
                    "record": i,
                    "meaning": meanings[i],
                    "response": text,
                    "sentence": text.strip().partition("\n")[0].strip(),
                    "seconds": seconds,
                }
                for i, text in zip(batch, texts, strict=True)
            ]

    def summarise(self, rows: Sequence[Row]) -> dict[str, float]:
        """See `Suite`: BLEU and chrF of the corpus, in percent."""
        statistics = self._statistics(rows)
        return {name: self._score(name, x.sum(0)) for name, x in statistics.items()}

    def compare(
        self, before: Sequence[Sequence[Row]], after: Sequence[Sequence[Row]]
    ) -> dict[str, Difference]:
        """See `Suite`."""
        pairs = [
            (self._statistics(first), self._statistics(second))
            for first, second in zip(before, after, strict=True)
        ]

        def change(name: str, *chosen: np.ndarray) -> np.ndarray:
            by_task = [
                [
                    self._score(name, second[name][i].sum(0))
                    - self._score(name, first[name][i].sum(0))
                    for i in indices
                ]
                for (first, second), indices in zip(pairs, chosen, strict=True)
            ]
            return np.mean(by_task, axis=0)

        sizes = [len(rows) for rows in before]
        return {
            name: paired_bootstrap(
                sizes, lambda *chosen, name=name: change(name, *chosen), resamples=1000
            )
            for name in self._metrics
        }

    def _statistics(self, rows: Sequence[Row]) -> dict[str, np.ndarray]:
        """What the metrics add up over sentences, (sentences, counts)."""
        sentences = [row["sentence"] for row in rows]
        references = [self.references[row["task"]][row["meaning"]] for row in rows]
        most = max(map(len, references))
        columns = [
            [found[n] if n < len(found) else None for found in references]
            for n in range(most)
        ]
        return {
            # As sacrebleu's own paired tests do.
            name: np.array(metric._extract_corpus_statistics(sentences, columns))
            for name, metric in self._metrics.items()
        }

    def _score(self, name: str, counts: np.ndarray) -> float:
        return float(self._metrics[name]._compute_score_from_stats(counts).score)

    def describe(self, task: str, row: Row) -> tuple[str, str, str]:
        """See `Suite`."""
        truth = self.references[task][row["meaning"]][0]
        return row["meaning"], row["sentence"], truth

    def outcome(self, row: Row) -> Any:
        """See `Suite`."""
        return row["sentence"]


def _metrics() -> dict[str, Any]:
    try:
        from sacrebleu.metrics.bleu import BLEU
        from sacrebleu.metrics.chrf import CHRF
    except ImportError as error:
        raise InputError(
            "--protocol e2e needs sacrebleu: pip install 'manifold-lora[evaluate]'."
        ) from error
    return {"BLEU": BLEU(), "chrF": CHRF()}


def read_e2e(file: Path) -> dict[str, list[str]]:
    """The sentences of every meaning representation of a file.

    Raises:
        InputError: the file cannot be read, or a line is not of the form.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--data {file} cannot be read: {error}.") from error
    references: dict[str, list[str]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        meaning, bars, sentence = line.partition(BARS)
        if not (meaning.strip() and bars and sentence.strip()):
            raise InputError(
                f"{file}:{number}: needs a meaning representation, {BARS} and a "
                "sentence: is it a file of the E2E benchmark?"
            )
        references.setdefault(meaning.strip(), []).append(sentence.strip())
    if not references:
        raise InputError(f"{file} holds no records; at least one is needed.")
    return references
