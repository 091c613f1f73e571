"""Held-out examples to choose the rates on, and others to report the results on."""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

from manifold_lora.data.tokens import Example
from manifold_lora.errors import InputError
from manifold_lora.training.config import TrainConfig
from manifold_lora.training.data import Data


class Splits(NamedTuple):
    """The data of a comparison; no record is in two parts."""

    data: Data  # to train on; its held-out part is the test part
    validation: list[Example]
    test: list[Example]


def split_held_out(config: TrainConfig, data: Data) -> Splits:
    """Hold out a validation part beside the test part.

    With --eval-data that file is the test part, and the validation part is held out of
    the training data; otherwise each has half of the examples that are held out.

    Raises:
        InputError: there are too few records.
    """
    seed = config.data.split_seed
    if config.data.eval_path is None:
        count = len(_by_record(data.held_out)) // 2
        if count == 0:
            raise InputError(
                "one record is held out, but a comparison needs two: one to choose the "
                "learning rates on, and one to report on. Add records to --data or "
                "raise --eval-examples."
            )
        validation, test = _split(data.held_out, count, seed)
        return Splits(data._replace(held_out=test), validation, test)
    records = len(_by_record(data.train))
    if records == 1:
        raise InputError(
            "--data has one record, and one must be held out to choose the learning "
            "rates on: add records."
        )
    count = min(config.data.eval_examples, max(1, records // 10))
    validation, train = _split(data.train, count, seed)
    return Splits(data._replace(train=train), validation, data.held_out)


def _split(
    examples: Sequence[Example], count: int, seed: int
) -> tuple[list[Example], list[Example]]:
    """The examples of `count` random records and those of the others, in order."""
    records = _by_record(examples)
    order = np.random.default_rng(seed).permutation(len(records))
    chosen = set(order[:count].tolist())
    parts: tuple[list[Example], list[Example]] = ([], [])
    for number, rows in enumerate(records):
        parts[number not in chosen].extend(rows)
    return parts


def _by_record(examples: Sequence[Example]) -> list[list[Example]]:
    """The examples of each record: a long text has been split into several."""
    records: dict[Hashable, list[Example]] = {}
    for number, example in enumerate(examples):
        records.setdefault(example.location or number, []).append(example)
    return list(records.values())
