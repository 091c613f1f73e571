import json
from collections import Counter
from collections.abc import Iterable
from itertools import combinations, islice
from typing import Any

import numpy as np
import pytest

from manifold_lora.data.batches import (
    Batch,
    batches,
    bucket_lengths,
    evaluation_batches,
    unpacked_fill,
)
from manifold_lora.data.tokens import Example
from manifold_lora.errors import InputError

LENGTH = 16
DTYPES = {
    "input_ids": np.int32,
    "loss_mask": np.float32,
    "positions": np.int32,
    "segment_ids": np.int32,
}


def make_examples(count: int, seed: int = 0) -> list[Example]:
    """Distinct examples: the i-th starts with token 1000 + i."""
    rng = np.random.default_rng(seed)
    examples = []
    for index in range(count):
        size = int(rng.integers(2, LENGTH + 1))
        ids = rng.integers(1, 1000, size)
        ids[0] = 1000 + index
        mask = rng.random(size) < 0.5
        mask[0], mask[-1] = False, True
        examples.append(Example(ids.astype(np.int32), mask))
    return examples


def key(ids: Iterable[int], mask: Iterable[float]) -> tuple[tuple[int, bool], ...]:
    return tuple((int(i), bool(m)) for i, m in zip(ids, mask, strict=True))


def segments(data: Iterable[Batch], batch_size: int) -> list[tuple]:
    """Every segment of every row, in order; checks dtypes, shapes and padding."""
    all_segments = []
    for batch in data:
        assert {name: array.dtype for name, array in batch.items()} == DTYPES
        assert {array.shape for array in batch.values()} == {(batch_size, LENGTH)}
        for row in range(batch_size):
            ids, mask, positions, segment_ids = (batch[name][row] for name in DTYPES)
            padding = segment_ids == 0
            assert np.all(np.diff(padding.astype(int)) >= 0), "padding is on the right"
            for array in (ids, mask, positions):
                assert not array[padding].any()
            count = segment_ids.max()
            assert set(segment_ids[~padding]) == set(range(1, count + 1))
            for segment in range(1, count + 1):
                (at,) = np.nonzero(segment_ids == segment)
                assert at.tolist() == list(range(at[0], at[-1] + 1))
                assert positions[at].tolist() == list(range(len(at)))
                assert mask[at[0]] == 0
                all_segments.append(key(ids[at], mask[at]))
    return all_segments


def keys(examples: list[Example]) -> list[tuple]:
    return [key(example.input_ids, example.loss_mask) for example in examples]


def first_tokens(data: Iterable[Batch], count: int) -> list[list[int]]:
    return [batch["input_ids"][:, 0].tolist() for batch in islice(data, count)]


def test_unpacked_rows() -> None:
    examples = [
        Example(np.array([7, 8, 9], np.int32), np.array([False, False, True])),
        Example(np.array([5, 6], np.int32), np.array([True, True])),
    ]
    data = batches(examples, batch_size=2, sequence_length=4, seed=0, shuffle=False)
    batch = next(iter(data))
    assert batch["input_ids"].tolist() == [[7, 8, 9, 0], [5, 6, 0, 0]]
    assert batch["loss_mask"].tolist() == [[0, 0, 1, 0], [0, 1, 0, 0]]
    assert batch["positions"].tolist() == [[0, 1, 2, 0], [0, 1, 0, 0]]
    assert batch["segment_ids"].tolist() == [[1, 1, 1, 0], [1, 1, 0, 0]]
    assert examples[1].loss_mask.all(), "the examples are not changed"


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("epochs", [1, 3])
def test_every_example_occurs_once_per_epoch(
    packing: bool, shuffle: bool, epochs: int
) -> None:
    examples = make_examples(150)
    data = batches(
        examples,
        batch_size=4,
        sequence_length=LENGTH,
        seed=1,
        shuffle=shuffle,
        packing=packing,
        epochs=epochs,
    )
    got = segments(data, batch_size=4)
    assert Counter(got) == Counter(keys(examples) * epochs)
    if not packing:
        assert (got == keys(examples) * epochs) == (not shuffle)


def test_packing_fills_rows() -> None:
    examples = make_examples(400)
    options: dict[str, Any] = {"batch_size": 4, "sequence_length": LENGTH}
    rows = {
        packing: len(
            list(batches(examples, seed=0, packing=packing, epochs=1, **options))
        )
        for packing in (False, True)
    }
    tokens = sum(len(example.input_ids) for example in examples)
    assert rows[False] == 100
    assert rows[True] * 4 * LENGTH < 1.2 * tokens


def test_each_epoch_is_another_permutation() -> None:
    examples = make_examples(12)
    data = batches(examples, batch_size=12, sequence_length=LENGTH, seed=0)
    epochs = first_tokens(data, 4)
    assert all(sorted(epoch) == list(range(1000, 1012)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


@pytest.mark.parametrize("packing", [False, True])
def test_the_seed_determines_the_order(packing: bool) -> None:
    examples = make_examples(40)
    orders = [
        first_tokens(
            batches(
                examples,
                batch_size=4,
                sequence_length=LENGTH,
                seed=seed,
                packing=packing,
            ),
            10,
        )
        for seed in (0, 0, 1)
    ]
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.smoke
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("consumed", [0, 1, 7, 30])
def test_a_restored_state_continues_with_the_same_batches(
    packing: bool, consumed: int
) -> None:
    def data():
        return iter(
            batches(
                make_examples(50),
                batch_size=4,
                sequence_length=LENGTH,
                seed=3,
                packing=packing,
            )
        )

    original = data()
    for _ in range(consumed):
        next(original)
    state = json.loads(json.dumps(original.get_state()))
    restored = data()
    restored.set_state(state)
    for _ in range(20):
        expected, got = next(original), next(restored)
        for name in DTYPES:
            np.testing.assert_array_equal(got[name], expected[name])


@pytest.mark.parametrize("packing", [False, True])
def test_fewer_examples_than_rows(packing: bool) -> None:
    """Without a limit, epochs share a batch; a single epoch is padded by empty rows."""
    examples = make_examples(3)
    options: dict[str, Any] = {
        "batch_size": 8,
        "sequence_length": LENGTH,
        "packing": packing,
    }
    endless = segments(islice(batches(examples, seed=0, **options), 3), batch_size=8)
    assert set(endless) == set(keys(examples))
    (once,) = batches(examples, seed=0, epochs=1, **options)
    assert Counter(segments([once], batch_size=8)) == Counter(keys(examples))


@pytest.mark.parametrize("count", [1, 8, 11])
def test_evaluation_has_every_example_once_in_order(count: int) -> None:
    examples = make_examples(count)
    data = list(evaluation_batches(examples, batch_size=4, sequence_length=LENGTH))
    assert len(data) == -(-count // 4)
    assert segments(data, batch_size=4) == keys(examples)
    for batch in data:
        assert batch["segment_ids"].max() == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"examples": []}, "no examples"),
        ({"batch_size": 0}, "--batch-size and --sequence-length must be .* got 0"),
        ({"sequence_length": 1}, "an example has .* tokens, more than the 1 of a row"),
        ({"epochs": 0}, "--epochs must be at least 1, got 0"),
    ],
)
def test_invalid_values_raise_at_once(change: dict, message: str) -> None:
    options: dict[str, Any] = {
        "examples": make_examples(3),
        "batch_size": 4,
        "sequence_length": LENGTH,
        "seed": 0,
    }
    with pytest.raises(InputError, match=message):
        batches(**(options | change))


@pytest.mark.parametrize("packing", [False, True])
def test_rows_of_several_processes_equal_those_of_one(packing: bool) -> None:
    examples = make_examples(50)
    options: dict[str, Any] = {"batch_size": 4, "sequence_length": LENGTH, "seed": 1}
    options |= {"packing": packing, "epochs": 2}
    parts = [batches(examples, rows=rows, **options) for rows in ([0, 3], [1, 2])]
    count = 0
    for batch, first, second in zip(batches(examples, **options), *parts, strict=True):
        for name, x in batch.items():
            np.testing.assert_array_equal(first[name], x[[0, 3]])
            np.testing.assert_array_equal(second[name], x[[1, 2]])
        count += 1
    assert count > 5


def test_an_unpacked_row_reads_only_its_own_example() -> None:
    read: list[int] = []

    class Recorded(list[Example]):
        def __getitem__(self, number: Any) -> Any:
            read.append(number)
            return super().__getitem__(number)

    options: dict[str, Any] = {"batch_size": 4, "sequence_length": LENGTH, "seed": 0}
    data = batches(Recorded(make_examples(8)), rows=[1, 2], shuffle=False, **options)
    next(iter(data))
    assert read == [1, 2]


def of_sizes(sizes: Iterable[int]) -> list[Example]:
    return [Example(np.ones(n, np.int32), np.ones(n, np.bool_)) for n in sizes]


def expected_columns(sizes: np.ndarray, rows: int, lengths: Iterable[int]) -> float:
    """Columns of a batch of `rows` sizes drawn at random, by adding up its longest."""
    total, below = 0.0, 0.0
    for length in lengths:
        reached = float(np.mean(sizes <= length)) ** rows
        total += length * (reached - below)
        below = reached
    return total


@pytest.mark.parametrize("rows", [1, 4, 16])
@pytest.mark.parametrize("longest", [40, 100])
def test_lengths_are_those_with_the_least_padding(rows: int, longest: int) -> None:
    rng = np.random.default_rng(longest)
    sizes = np.minimum(rng.geometric(0.06, 300) + 1, longest)
    lengths = bucket_lengths(of_sizes(sizes), rows, 512)
    needed = -(-sizes.max() // 8) * 8
    assert lengths[-1] == needed and 1 <= len(lengths) <= 4
    columns = expected_columns(sizes, rows, lengths)
    fewest = {  # over all choices of as many multiples of 8
        count: min(
            expected_columns(sizes, rows, (*chosen, needed))
            for chosen in combinations(range(8, needed, 8), count - 1)
        )
        for count in range(1, 5)
    }
    assert columns == pytest.approx(fewest[len(lengths)])
    for count in range(2, len(lengths) + 1):  # each saves a twentieth
        assert fewest[count] <= 0.95 * fewest[count - 1]
    if len(lengths) < 4:
        assert fewest[len(lengths) + 1] > 0.95 * columns


def test_lengths_of_equal_examples_and_of_the_longest_row() -> None:
    assert bucket_lengths(of_sizes([5] * 40), 4, 512) == (8,)
    assert bucket_lengths(of_sizes([12] * 40), 4, 12) == (12,)


@pytest.mark.parametrize("rows", [4, 16])
def test_the_fill_is_that_of_the_batches(rows: int) -> None:
    sizes = np.random.default_rng(1).geometric(0.1, 3000) + 1
    examples = of_sizes(sizes)
    lengths = bucket_lengths(examples, rows, 512)
    options: dict[str, Any] = {"batch_size": rows, "sequence_length": 512, "seed": 0}
    options |= {"epochs": 1}
    data = list(batches(examples, lengths=lengths, **options))
    fill = sizes.sum() / sum(batch["input_ids"].size for batch in data)
    assert unpacked_fill(examples, rows, lengths) == pytest.approx(fill, rel=0.02)
    # three examples in a batch of four rows
    assert unpacked_fill(of_sizes([8, 8, 8]), 4, (8,)) == 0.75


def test_a_batch_has_the_least_length_for_its_longest_row() -> None:
    examples = make_examples(200)
    options: dict[str, Any] = {"batch_size": 4, "sequence_length": LENGTH, "seed": 2}
    options |= {"epochs": 2}
    lengths = (3, 8, 12, LENGTH)
    count = Counter[int]()
    for batch, full in zip(
        batches(examples, lengths=lengths, **options),
        batches(examples, **options),
        strict=True,
    ):
        columns = batch["input_ids"].shape[1]
        longest = int((full["segment_ids"] > 0).sum(axis=1).max())
        assert columns == min(length for length in lengths if length >= longest)
        for name, x in batch.items():
            np.testing.assert_array_equal(x, full[name][:, :columns])
            assert not full[name][:, columns:].any()
        count[columns] += 1
    assert len(count) > 2


def test_processes_agree_on_the_lengths_of_batches() -> None:
    examples = make_examples(50)
    options: dict[str, Any] = {"batch_size": 4, "sequence_length": LENGTH, "seed": 1}
    options |= {"epochs": 2, "lengths": (13, 14, 15, LENGTH)}
    parts = [batches(examples, rows=rows, **options) for rows in ([0, 3], [1, 2])]
    columns = set()
    for batch, first, second in zip(batches(examples, **options), *parts, strict=True):
        for name, x in batch.items():
            np.testing.assert_array_equal(first[name], x[[0, 3]])
            np.testing.assert_array_equal(second[name], x[[1, 2]])
        columns.add(batch["input_ids"].shape[1])
    assert len(columns) > 1


@pytest.mark.parametrize("packing", [False, True])
def test_a_restored_state_continues_to_the_end_of_the_last_epoch(packing: bool) -> None:
    def data():
        options: dict[str, Any] = {"batch_size": 4, "sequence_length": LENGTH}
        options |= {"seed": 3, "packing": packing, "epochs": 2, "lengths": (8, LENGTH)}
        return iter(batches(make_examples(37), **options))

    original = data()
    for _ in range(6):
        next(original)
    restored = data()
    restored.set_state(json.loads(json.dumps(original.get_state())))
    rest = [list(original), list(restored)]
    assert len(rest[0]) == len(rest[1]) > 2
    for expected, got in zip(*rest, strict=True):
        for name in DTYPES:
            np.testing.assert_array_equal(got[name], expected[name])
