"""The examples of a run: read, split, encoded and batched as it is configured."""

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from manifold_lora.data.batches import (
    batches,
    bucket_lengths,
    unpacked_fill,
)
from manifold_lora.data.builtin import builtin_records
from manifold_lora.data.files import find_files
from manifold_lora.data.records import FilesRead, Record, read_files
from manifold_lora.data.tokens import Example, Report, encode
from manifold_lora.errors import InputError
from manifold_lora.evaluation.batches import HeldOutBatches
from manifold_lora.training.config import TrainConfig

# Rows are packed where more than a tenth would be padding and an epoch keeps its steps.
FULL_ENOUGH = 0.9
PACKED_STEPS = 50
# Shown of the records that are left out.
MAX_REASONS, MAX_LOCATIONS = 5, 10
MEASURED = 20_000  # examples that are packed to measure how full the rows are


class Data(NamedTuple):
    """Encoded examples, and the counts of what reading and encoding left out."""

    train: list[Example]
    held_out: list[Example]
    report: Report  # of the training examples
    held_out_report: Report
    skipped: tuple[str, ...]  # location and reason of the records left out
    ignored_keys: Counter[str]  # keys without meaning, with their records
    packing: bool
    lengths: tuple[int, ...]  # columns that training batches may have, ascending
    fill: float  # share of the tokens of training batches that are not padding
    fill_unpacked: float

    @property
    def row_length(self) -> int:
        """Columns of the longest training batch."""
        return self.lengths[-1]


def load_data(config: TrainConfig, tokenizer: Any) -> Data:
    """Training and held-out examples, from files or built in."""
    read, held_out, name = _read(config)
    options = {"date": config.data.date, "skip_invalid": config.data.skip_invalid}
    length = config.batch.sequence_length
    train, report = encode(
        read.records, tokenizer, length, config.data.train_on_prompt, **options
    )
    with _naming(name):
        evaluated, held_out_report = encode(held_out, tokenizer, length, **options)
    return Data(
        train,
        evaluated,
        report,
        held_out_report,
        (*read.skipped, *report.invalid, *held_out_report.invalid),
        read.ignored_keys,
        *_choose_packing(config, train),
    )


def _read(config: TrainConfig) -> tuple[FilesRead, list[Record], str]:
    """What is read, the held-out records, and what messages call these."""
    settings = config.data
    files = find_files(settings.paths)
    if settings.paths:
        read = read_files(files.train, skip_invalid=settings.skip_invalid)
        held_out, name = [], "the held-out part of --data"
    else:
        train, held_out = builtin_records()
        read, name = FilesRead(train, [], Counter()), "the built-in held-out data"
    if settings.eval_path is not None or files.valid:
        paths = [settings.eval_path] if settings.eval_path is not None else files.valid
        name = f"the held-out data, {', '.join(map(str, paths))}"
        with _naming(name):
            other = read_files(paths, skip_invalid=settings.skip_invalid)
        read.skipped.extend(other.skipped)
        held_out = other.records
    elif settings.paths:
        train, held_out = _hold_out(config, read.records)
        read = read._replace(records=train)
    return read, held_out, name


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Errors say which part of the data they are of."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{name}: {error}") from error


def _hold_out(
    config: TrainConfig, records: list[Record]
) -> tuple[list[Record], list[Record]]:
    if len(records) < 2:
        raise InputError(
            f"--data {' '.join(map(str, config.data.paths))} has one record, and one "
            "must be held out to evaluate on: add records, or give --eval-data."
        )
    count = min(config.data.eval_examples, max(1, len(records) // 10))
    order = np.random.default_rng(config.data.split_seed).permutation(len(records))
    chosen = set(order[:count].tolist())
    training = [record for i, record in enumerate(records) if i not in chosen]
    return training, [record for i, record in enumerate(records) if i in chosen]


def _choose_packing(
    config: TrainConfig, examples: list[Example]
) -> tuple[bool, tuple[int, ...], float, float]:
    """Whether rows are packed, the columns of batches, and how full rows are."""
    batch_size, longest = config.batch.batch_size, config.batch.sequence_length
    lengths = bucket_lengths(examples, batch_size, longest)
    fill_unpacked = unpacked_fill(examples, batch_size, lengths)
    packing = config.data.packing
    if packing is None:
        tokens = sum(len(example.input_ids) for example in examples)
        steps = tokens / (batch_size * longest)
        packing = fill_unpacked < FULL_ENOUGH and steps >= PACKED_STEPS
    if not packing:
        return False, lengths, fill_unpacked, fill_unpacked
    measured = examples[:MEASURED]
    packed = batches(
        measured,
        batch_size=batch_size,
        sequence_length=longest,
        seed=config.optimizer.seed,
        packing=True,
        epochs=1,
    )
    tokens = sum(len(example.input_ids) for example in measured)
    size = sum(1 for _ in packed) * batch_size * longest
    return True, (longest,), tokens / size, fill_unpacked


def held_out_batches(config: TrainConfig, data: Data) -> HeldOutBatches:
    """The held-out examples, in batches of as many tokens as training has at a time."""
    rows = config.batch.batch_size // config.batch.accumulate
    length = config.batch.sequence_length
    return HeldOutBatches(data.held_out, rows * data.row_length, length)


def training_batches(
    config: TrainConfig, data: Data, rows: Sequence[int] | None = None
) -> Any:
    """The batches of a run, or some rows of each, in an order that its seed decides.

    A run of `epochs` has every example exactly that many times; its last batch is
    filled with empty rows. A run of `steps` has as many batches as are asked for.
    """
    return batches(
        data.train,
        batch_size=config.batch.batch_size,
        sequence_length=data.row_length,
        seed=config.optimizer.seed,
        packing=data.packing,
        epochs=None if config.schedule.steps is not None else config.schedule.epochs,
        rows=rows,
        lengths=data.lengths,
    )


def total_steps(config: TrainConfig, data: Data) -> int:
    """The number of steps; with packing it takes packing the data to know it."""
    steps, epochs = config.schedule.steps, config.schedule.epochs
    if steps is not None:
        return steps
    assert epochs is not None
    if data.packing:
        return sum(1 for _ in training_batches(config, data))
    return -(-len(data.train) * epochs // config.batch.batch_size)


def describe_data(config: TrainConfig, data: Data) -> dict[str, str]:
    """What the plan says of the data and its batches."""
    report, batch = data.report, config.batch
    names = ", ".join(map(str, config.data.paths))
    rows = "packed" if data.packing else "unpacked"
    lengths = " or ".join(f"{length:,}" for length in data.lengths)
    other = f", {data.fill_unpacked:.0%} unpacked" if data.packing else ""
    largest = batch.batch_size * data.row_length
    texts = {
        "data": f"{names or 'built in, Unicode names to categories'}: "
        f"{report.kept:,} examples, {len(data.held_out):,} held out",
        "tokens": f"{report.tokens:,}, of them {report.trained_tokens:,} trained",
        "batch": f"{batch.batch_size} rows of {lengths}"
        + (f" in {batch.accumulate} micro-batches" if batch.accumulate > 1 else "")
        + f", {rows}",
        "tokens per step": f"{largest:,}{' at most' if len(data.lengths) > 1 else ''}, "
        "padding included",
        "padding": f"{1 - data.fill:.0%} of the tokens "
        f"({rows}: rows {data.fill:.0%} full{other})",
    }
    reports = {"": report, ", held out": data.held_out_report}
    for name, part in reports.items():
        if part.truncated:
            texts[f"truncated{name}"] = (
                f"{part.truncated:,} examples truncated to {batch.sequence_length} "
                f"tokens (longest {part.longest:,})"
            )
        if part.split:
            texts[f"split{name}"] = (
                f"{part.split:,} texts split into rows of {batch.sequence_length} "
                f"tokens (longest {part.longest:,})"
            )
    if data.ignored_keys:
        texts["ignored keys"] = ", ".join(
            f"{key} ({count:,})" for key, count in data.ignored_keys.most_common(12)
        )
        if len(data.ignored_keys) > 12:
            texts["ignored keys"] += f" and {len(data.ignored_keys) - 12} more"
    if data.skipped:
        texts["records left out"] = _describe_skipped(data.skipped)
    return texts


def _describe_skipped(skipped: Sequence[str]) -> str:
    """How many records are left out, why and where, by reason."""
    locations: dict[str, list[str]] = {}
    for text in skipped:
        location, _, reason = text.partition(": ")
        locations.setdefault(reason, []).append(location)
    lines = [f"{len(skipped):,}"]
    for reason, places in list(locations.items())[:MAX_REASONS]:
        shown = ", ".join(places[:MAX_LOCATIONS])
        more = len(places) - MAX_LOCATIONS
        lines.append(f"{reason}: {shown}" + (f" and {more:,} more" if more > 0 else ""))
    if len(locations) > MAX_REASONS:
        lines.append(f"and {len(locations) - MAX_REASONS:,} more reasons")
    return "\n".join(lines)
