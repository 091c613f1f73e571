"""Held-out examples in micro-batches, as large as those of a training step."""

from collections.abc import Iterator, Sequence
from itertools import chain, groupby
from typing import Any

import jax

from manifold_lora.data.batches import evaluation_batches, padded_length
from manifold_lora.data.tokens import Example
from manifold_lora.distributed.arrays import BatchSharder

LENGTHS = 3  # of rows, each compiled once: the longest, half of it and a quarter


class HeldOutBatches:
    """Held-out examples in micro-batches, made one at a time in every iteration.

    Examples of similar length share a micro-batch, which is padded to one of a few
    lengths. The longest come first: where memory is short, it runs out at once. The
    batches are put on the mesh of `jax.set_mesh`; without one they stay on the host.

    Args:
        examples: from `encode`; their answers are evaluated. Without any, there are no
            batches.
        rows: of a micro-batch, over all processes.
        sequence_length: of the longest row that is allowed.

    Raises:
        InputError: an example is longer than `sequence_length`.

    Examples:
        >>> import numpy as np
        >>> examples = [Example(np.arange(n), np.arange(n) > 1) for n in (7, 40, 9, 33)]
        >>> batches = HeldOutBatches(examples, rows=2, sequence_length=512)
        >>> [batch["input_ids"].shape for batch in batches]
        [(2, 40), (2, 16)]
    """

    def __init__(self, examples: Sequence[Example], rows: int, sequence_length: int):
        mesh = jax.sharding.get_mesh()
        self._put = None if mesh.empty else BatchSharder(mesh, rows)
        local_rows = None if self._put is None else self._put.local_rows
        longest = padded_length(examples, sequence_length) if examples else 0
        lengths = [min(-(-longest // (8 * 2**n)) * 8, longest) for n in range(LENGTHS)]

        def padded(batch: Sequence[Example]) -> int:
            fitting = (n for n in lengths if n >= len(batch[0].input_ids))
            return min(fitting, default=longest)

        ordered = sorted(examples, key=lambda e: len(e.input_ids), reverse=True)
        full = [ordered[start : start + rows] for start in range(0, len(ordered), rows)]
        self._parts = [
            evaluation_batches(
                list(chain.from_iterable(part)),
                batch_size=rows,
                sequence_length=length,
                rows=local_rows,
            )
            for length, part in groupby(full, padded)
        ]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in chain.from_iterable(self._parts):
            yield batch if self._put is None else self._put(batch)
