"""Print a batch, with the trained tokens highlighted."""

from collections.abc import Mapping
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.text import Text

from manifold_lora.console import printable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARKERS = ("{+", "+}")  # as in a word diff, on a console without colour


def show_batch(
    batch: Mapping[str, np.ndarray],
    tokenizer: "PreTrainedTokenizerBase",
    console: Console,
    *,
    rows: int = 4,
) -> None:
    """Print a batch, to check before training which tokens are trained.

    Trained tokens are bold green, or enclosed in {+ +} on a console without colour.
    Each segment has a heading with its token counts; padding is counted.

    Args:
        batch: One of `batches`: arrays (batch, sequence_length).
        tokenizer: The one that encoded it.
        console: Where to print.
        rows: Maximum number of rows to print; the others are counted.
    """
    colour = console.color_system is not None and not console.no_color
    opening, closing = ("", "") if colour else MARKERS
    segment_ids, trained = batch["segment_ids"], batch["loss_mask"] > 0

    def line(*parts: str | tuple[str, str]) -> None:
        console.print(Text.assemble(*parts), soft_wrap=True)

    legend = f"{opening}trained{closing}"
    line((legend, "bold green"), " ", ("not trained", "dim"))
    for row in range(min(rows, len(segment_ids))):
        for segment in range(1, segment_ids[row].max() + 1):
            in_segment = segment_ids[row] == segment
            is_target = trained[row][in_segment]
            counts = f"{in_segment.sum()} tokens, {is_target.sum()} trained"
            line((f"row {row + 1}, segment {segment}: {counts}", "bold cyan"))
            text = Text()
            pairs = zip(batch["input_ids"][row][in_segment], is_target, strict=True)
            # Decode runs, not tokens: a token may be a fragment of a character.
            for target, run in groupby(pairs, key=lambda pair: bool(pair[1])):
                decoded = printable(tokenizer.decode([int(token) for token, _ in run]))
                if target:
                    text.append(f"{opening}{decoded}{closing}", "bold green")
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
