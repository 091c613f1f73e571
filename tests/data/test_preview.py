import io

import numpy as np
from rich.console import Console

from manifold_lora.data.batches import batches
from manifold_lora.data.preview import show_batch
from manifold_lora.data.records import Record
from manifold_lora.data.tokens import encode
from tests.data import BOS, EOS, make_tokenizer

RECORDS = [
    Record(prompt="Q:", completion=" café [b]"),  # é is two tokens, [b] is not markup
    Record(prompt="R:", completion=" x"),
]


def printed(color_system, *, packing: bool = False, rows: int = 4) -> str:
    tokenizer = make_tokenizer()
    examples, _ = encode(RECORDS, tokenizer, 24)
    (batch,) = batches(
        examples,
        batch_size=3,
        sequence_length=24,
        seed=0,
        shuffle=False,
        packing=packing,
        epochs=1,
    )
    console = Console(
        file=io.StringIO(),
        color_system=color_system,
        force_terminal=color_system is not None,
        width=20,
    )
    before = {name: array.copy() for name, array in batch.items()}
    show_batch(batch, tokenizer, console, rows=rows)
    for name, array in batch.items():
        np.testing.assert_array_equal(array, before[name])
    return console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def test_without_colour_trained_tokens_are_enclosed_in_markers() -> None:
    assert printed(None).splitlines() == [
        "{+trained+} not trained",
        "row 1, segment 1: 14 tokens, 11 trained",
        BOS + "Q:{+ café [b]" + EOS + "+}",
        "row 1: 10 padding",
        "row 2, segment 1: 6 tokens, 3 trained",
        BOS + "R:{+ x" + EOS + "+}",
        "row 2: 18 padding",
        "row 3: 24 padding",
        "3 rows of 24: 20 tokens, 14 trained, 52 padding",
    ]


def test_with_colour_trained_tokens_are_bold_green() -> None:
    lines = printed("standard").splitlines()
    assert f"\x1b[2m{BOS}Q:\x1b[0m\x1b[1;32m café [b]{EOS}\x1b[0m" in lines
    assert not any("{+" in line for line in lines)


def test_packed_rows_show_each_segment() -> None:
    lines = printed(None, packing=True).splitlines()
    assert "row 1, segment 1: 14 tokens, 11 trained" in lines
    assert "row 1, segment 2: 6 tokens, 3 trained" in lines
    assert "row 1: 4 padding" in lines


def test_further_rows_are_counted() -> None:
    assert "... and 2 more rows" in printed(None, rows=1).splitlines()
