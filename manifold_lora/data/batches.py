"""Examples to batches of a few shapes, in an order that can be saved and resumed."""

import bisect
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from manifold_lora.data.tokens import Example
from manifold_lora.errors import InputError

if TYPE_CHECKING:
    import grain

Batch = dict[str, np.ndarray]
PACKING_ROWS = 64  # open bins: rows are 95-99 % full, against 86-98 % with 4
MAX_LENGTHS = 4  # each compiles the step once
MIN_SAVING = 0.05  # of the tokens, for one more length


def batches(
    examples: Sequence[Example],
    *,
    batch_size: int,
    sequence_length: int,
    seed: int,
    shuffle: bool = True,
    packing: bool = False,
    epochs: int | None = None,
    rows: Sequence[int] | None = None,
    lengths: Sequence[int] = (),
) -> "grain.IterDataset[Batch]":
    """Training batches of one shape or a few, each of which the step compiles once.

    A batch may span two epochs. With `epochs` every example occurs exactly that many
    times and the last batch is padded with empty rows, which a loss per answer token
    ignores. `packing` puts several examples in a row, separated by `segment_ids`; it
    pays off where lengths vary.

    Args:
        examples: From `encode`, none longer than `sequence_length`.
        batch_size: Rows of a batch.
        sequence_length: Columns of a batch; at most, with `lengths`.
        seed: Determines the order; the same seed gives the same batches.
        shuffle: Reshuffle in each epoch; otherwise keep the given order.
        packing: Several examples per row, by grain's first-fit packing.
        epochs: Passes over the examples; None repeats indefinitely.
        rows: Indices of the rows of each batch to produce, in ascending order; None
            produces all. The rows of several processes together are those of a single
            one; only packing also reads the examples of other rows.
        lengths: Columns that batches without packing may have, ascending; each batch
            has as few as its longest row needs, over all its rows. From
            `bucket_lengths`; none: all have `sequence_length`.

    Returns:
        A grain dataset of dicts of arrays (rows, columns): `input_ids`
        int32; `loss_mask` float32, 1 where the token is itself a target;
        `positions` int32, from 0 in each segment; `segment_ids` int32, from 1 in
        each row, 0 on padding. Its iterator has `get_state` and `set_state`, whose
        state is JSON.

    Raises:
        InputError: No examples, one too long, or a size that is not positive.

    Example:
        >>> example = Example(np.array([5, 6], np.int32), np.array([False, True]))
        >>> data = batches([example], batch_size=1, sequence_length=4, seed=0)
        >>> batch = next(iter(data))
        >>> batch["input_ids"].tolist(), batch["segment_ids"].tolist()
        ([[5, 6, 0, 0]], [[1, 1, 0, 0]])
    """
    import grain

    _check(examples, batch_size, sequence_length)
    if epochs is not None and epochs < 1:
        raise InputError(f"--epochs must be at least 1, got {epochs}.")
    numbers = grain.MapDataset.range(len(examples)).seed(seed)
    if shuffle:
        numbers = numbers.shuffle()
    numbers = numbers.repeat(epochs)
    if not packing:
        lengths = lengths or (sequence_length,)
        return _unpacked(examples, numbers, batch_size, lengths, rows)
    columns = {"input_ids": sequence_length, "loss_mask": sequence_length}
    packed = grain.experimental.FirstFitPackIterDataset(
        _in_memory(numbers.map(lambda number: _segment(examples[number]))),
        length_struct=columns,
        num_packing_bins=max(PACKING_ROWS, batch_size),
        seed=seed,
        shuffle_bins=shuffle,  # the first rows are the fullest
    ).map(_packed_row)
    pad = partial(grain.experimental.batch_and_pad, batch_size=batch_size)
    full_batches = packed.batch(batch_size, batch_fn=pad)
    if rows is None:
        return full_batches
    return full_batches.map(lambda batch: {k: x[list(rows)] for k, x in batch.items()})


def evaluation_batches(
    examples: Sequence[Example],
    *,
    batch_size: int,
    sequence_length: int,
    rows: Sequence[int] | None = None,
) -> "grain.IterDataset[Batch]":
    """Every example once, in order, one per row, in batches of one shape.

    Use it for losses and accuracies over an entire data set; the last batch is padded
    with empty rows (`segment_ids` 0). The arrays and `rows` are those of `batches`, but
    `loss_mask` marks the answers, whatever training has its loss on.

    Raises:
        InputError: No examples, one too long, or a size that is not positive.
    """
    import grain

    _check(examples, batch_size, sequence_length)
    answers = [replace(example, loss_mask=example.answer_mask) for example in examples]
    numbers = grain.MapDataset.range(len(answers))
    return _unpacked(answers, numbers, batch_size, (sequence_length,), rows)


def bucket_lengths(
    examples: Sequence[Example], batch_size: int, sequence_length: int
) -> tuple[int, ...]:
    """The few lengths to which unpacked batches are padded, with the least padding.

    At most four multiples of 8; one more only where it saves a twentieth of the tokens.
    With F(L) the share of examples of at most L tokens, the longest of the n rows of a
    batch has at most L tokens with probability F(L)ⁿ: the lengths minimise the expected
    columns of a batch.

    >>> sizes = [8] * 99 + [64]
    >>> examples = [Example(np.zeros(n, np.int32), np.zeros(n, bool)) for n in sizes]
    >>> bucket_lengths(examples, 4, 512)
    (8, 64)
    """
    lengths, reached = _longest_rows(examples, batch_size, sequence_length)
    # Least expected columns of the batches up to each length, and the lengths for it.
    columns = lengths * reached
    chosen = [(length,) for length in lengths.tolist()]
    for _ in range(MAX_LENGTHS - 1):
        # If length i precedes length j: what i has, and j columns for those between.
        both = columns[:, None] + lengths * (reached - reached[:, None])
        both[np.tril_indices(len(lengths))] = np.inf
        before, more = both.argmin(axis=0), both.min(axis=0)
        if more[-1] > (1 - MIN_SAVING) * columns[-1]:
            break
        columns = more
        chosen = [
            (*chosen[i], length) for i, (*_, length) in zip(before, chosen, strict=True)
        ]
    return chosen[-1]


def unpacked_fill(
    examples: Sequence[Example], batch_size: int, lengths: Sequence[int]
) -> float:
    """The expected share of tokens that are not padding, in batches of these lengths.

    >>> sizes = [8] * 99 + [64]
    >>> examples = [Example(np.zeros(n, np.int32), np.zeros(n, bool)) for n in sizes]
    >>> round(unpacked_fill(examples, 1, (8, 64)), 3)
    1.0
    """
    padded, reached = _longest_rows(examples, batch_size, lengths[-1])
    columns = np.array(lengths)[np.searchsorted(lengths, padded)]
    expected = float(columns @ np.diff(reached, prepend=0))
    tokens = sum(len(example.input_ids) for example in examples)
    return tokens / (-(-len(examples) // batch_size) * batch_size * expected)


def _longest_rows(
    examples: Sequence[Example], batch_size: int, sequence_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Padded lengths of rows, and the probability that no row of a batch is longer."""
    sizes = np.array([len(example.input_ids) for example in examples])
    padded = np.minimum(-(-sizes // 8) * 8, sequence_length)
    lengths, counts = np.unique(padded, return_counts=True)
    share = counts.cumsum() / len(examples)
    kept = np.unique(np.linspace(0, len(lengths) - 1, 128).astype(int))
    rows = min(batch_size, len(examples))
    return lengths[kept], share[kept] ** rows


def _check(examples: Sequence[Example], batch_size: int, sequence_length: int) -> None:
    if batch_size < 1 or sequence_length < 1:
        raise InputError(
            "--batch-size and --sequence-length must be at least 1, "
            f"got {batch_size} and {sequence_length}."
        )
    if not examples:
        raise InputError("there are no examples to batch; at least one is needed.")
    longest = max(len(example.input_ids) for example in examples)
    if longest > sequence_length:
        raise InputError(
            f"an example has {longest} tokens, more than the {sequence_length} of a "
            "row: encode with that sequence length, or raise --sequence-length."
        )


def _in_memory(source: "grain.MapDataset") -> "grain.IterDataset":
    import grain

    # The examples are arrays in memory, so reader threads would only contend.
    return source.to_iter_dataset(
        grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    )


def _unpacked(
    examples: Sequence[Example],
    numbers: "grain.MapDataset[int]",
    batch_size: int,
    lengths: Sequence[int],
    rows: Sequence[int] | None,
) -> "grain.IterDataset[Batch]":
    """Batches with one example per row; only the examples of `rows` are read."""
    rows = range(batch_size) if rows is None else rows
    sizes = [len(example.input_ids) for example in examples]

    def make_batch(numbers: list[int]) -> Batch:
        # All processes have to agree on it, so it depends on the rows of all.
        longest = max(sizes[number] for number in numbers)
        length = lengths[bisect.bisect_left(lengths, longest)]
        batch_rows = [
            _row(
                _segment(examples[numbers[row]]) if row < len(numbers) else None, length
            )
            for row in rows
        ]
        return {
            name: np.stack([row[name] for row in batch_rows]) for name in batch_rows[0]
        }

    return _in_memory(numbers).batch(batch_size, batch_fn=list).map(make_batch)


def _segment(example: Example) -> Batch:
    loss_mask = example.loss_mask.astype(np.float32)
    loss_mask[0] = 0  # there is no token before it to predict it from
    return {"input_ids": example.input_ids.astype(np.int32), "loss_mask": loss_mask}


def _row(segment: Batch | None, length: int) -> Batch:
    """A padded row with one segment or none."""
    row = {
        "input_ids": np.zeros(length, np.int32),
        "loss_mask": np.zeros(length, np.float32),
        "positions": np.zeros(length, np.int32),
        "segment_ids": np.zeros(length, np.int32),
    }
    if segment is None:
        return row
    size = len(segment["input_ids"])
    row["input_ids"][:size] = segment["input_ids"]
    row["loss_mask"][:size] = segment["loss_mask"]
    row["positions"][:size] = np.arange(size)
    row["segment_ids"][:size] = 1
    return row


def _packed_row(packed: Batch) -> Batch:
    return {
        "input_ids": packed["input_ids"],
        "loss_mask": packed["loss_mask"],
        "positions": packed["input_ids_positions"],
        "segment_ids": packed["input_ids_segment_ids"],
    }
