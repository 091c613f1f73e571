"""The examples of a run: read, split, encoded and batched as it is configured."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from manifold_lora.data.batches import batches, padded_length
from manifold_lora.data.builtin import builtin_records
from manifold_lora.data.records import Record, read_records
from manifold_lora.data.tokens import Example, Report, encode
from manifold_lora.errors import InputError
from manifold_lora.evaluation.batches import HeldOutBatches
from manifold_lora.training.config import TrainConfig


class Data(NamedTuple):
    """Encoded examples, and the counts of what encoding truncated and dropped."""

    train: list[Example]
    held_out: list[Example]
    report: Report  # of the training examples
    held_out_report: Report
    row_length: int  # columns of a training batch


def load_data(config: TrainConfig, tokenizer: Any) -> Data:
    """Training and held-out examples, from files or built in."""
    length = config.batch.sequence_length
    if config.data.path is None:
        train_records, held_out = builtin_records()
    else:
        train_records, held_out = read_records(config.data.path), []
    if config.data.eval_path is not None:
        held_out = read_records(config.data.eval_path)
    elif config.data.path is not None:
        train_records, held_out = _hold_out(config, train_records)
    encoded, report = encode(
        train_records,
        tokenizer,
        length,
        config.data.train_on_prompt,
        date=config.data.date,
    )
    evaluated, held_out_report = encode(
        held_out, tokenizer, length, date=config.data.date
    )
    if not config.data.packing:
        length = padded_length(encoded, length)
    return Data(encoded, evaluated, report, held_out_report, length)


def _hold_out(
    config: TrainConfig, records: list[Record]
) -> tuple[list[Record], list[Record]]:
    if len(records) < 2:
        raise InputError(
            f"--data {config.data.path} has one record, and one must be held out "
            "to evaluate on: add records, or give --eval-data."
        )
    count = min(config.data.eval_examples, max(1, len(records) // 10))
    order = np.random.default_rng(config.optimizer.seed).permutation(len(records))
    chosen = set(order[:count].tolist())
    training = [record for i, record in enumerate(records) if i not in chosen]
    return training, [record for i, record in enumerate(records) if i in chosen]


def held_out_batches(config: TrainConfig, data: Data) -> HeldOutBatches:
    """The held-out examples, in batches of as many tokens as training has at a time."""
    rows = config.batch.batch_size // config.batch.accumulate
    length = config.batch.sequence_length
    return HeldOutBatches(data.held_out, rows * data.row_length, length)


def training_batches(
    config: TrainConfig,
    data: Data,
    epochs: int | None = None,
    rows: Sequence[int] | None = None,
) -> Any:
    """The batches of a run, or some rows of each, in an order that its seed decides."""
    return batches(
        data.train,
        batch_size=config.batch.batch_size,
        sequence_length=data.row_length,
        seed=config.optimizer.seed,
        packing=config.data.packing,
        epochs=epochs,
        rows=rows,
    )


def total_steps(config: TrainConfig, data: Data) -> int:
    """The number of steps; with packing it takes packing the data to know it."""
    steps, epochs = config.schedule.steps, config.schedule.epochs
    if steps is not None:
        return steps
    assert epochs is not None
    if config.data.packing:
        return sum(1 for _ in training_batches(config, data, epochs))
    return -(-len(data.train) * epochs // config.batch.batch_size)
