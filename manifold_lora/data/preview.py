"""A batch on the screen, with the tokens that are trained told from the rest."""

from collections.abc import Mapping
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARKS = ("{+", "+}")  # as in a word diff, where there is no colour


def show_batch(
    batch: Mapping[str, np.ndarray],
    tokenizer: "PreTrainedTokenizerBase",
    console: Console,
    *,
    rows: int = 4,
) -> None:
    """Print a batch, to see before training what is trained.

    Trained tokens are bold green, or stand in {+ +} on a console without colour;
    each segment has a heading with its counts, and padding is counted.

    Args:
        batch: As `batches` gives it, arrays (batch, sequence_length).
        tokenizer: The one that encoded it.
        console: Where to print.
        rows: The most rows to print; the others are counted.
    """
    colour = console.color_system is not None and not console.no_color
    open_mark, close_mark = ("", "") if colour else MARKS
    segment_ids, trained = batch["segment_ids"], batch["loss_mask"] > 0

    def line(*parts: str | tuple[str, str]) -> None:
        console.print(Text.assemble(*parts), soft_wrap=True)

    legend = f"{open_mark}trained{close_mark}"
    line((legend, "bold green"), " ", ("not trained", "dim"))
    for row in range(min(rows, len(segment_ids))):
        for segment in range(1, segment_ids[row].max() + 1):
            here = segment_ids[row] == segment
            counts = f"{here.sum()} tokens, {trained[row][here].sum()} trained"
            line((f"row {row + 1}, segment {segment}: {counts}", "bold cyan"))
            text = Text()
            pairs = zip(batch["input_ids"][row][here], trained[row][here], strict=True)
            # Runs are decoded whole: a token may be a part of a character.
            for target, run in groupby(pairs, key=lambda pair: bool(pair[1])):
                decoded = str(tokenizer.decode([int(token) for token, _ in run]))
                if target:
                    text.append(f"{open_mark}{decoded}{close_mark}", "bold green")
                else:
                    text.append(decoded, "dim")
            console.print(text, soft_wrap=True)
        line((f"row {row + 1}: {(segment_ids[row] == 0).sum()} padding", "cyan"))
    if len(segment_ids) > rows:
        line(f"... and {len(segment_ids) - rows} more rows")
    line(
        f"{len(segment_ids)} rows of {segment_ids.shape[1]}: "
        f"{(segment_ids > 0).sum()} tokens, {trained.sum()} trained, "
        f"{(segment_ids == 0).sum()} padding"
    )
