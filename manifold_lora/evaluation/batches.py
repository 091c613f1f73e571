"""Held-out examples in batches no larger than the micro-batches of training."""

from collections.abc import Iterator, Sequence
from itertools import chain, groupby
from typing import Any

import jax

from manifold_lora.data.batches import bucket_lengths, evaluation_batches
from manifold_lora.data.tokens import Example
from manifold_lora.distributed.arrays import BatchSharder
from manifold_lora.distributed.mesh import group_count


class HeldOutBatches:
    """Held-out examples in batches, made one at a time in every iteration.

    Examples of similar length share a batch, which is padded to one of a few lengths
    and has as many rows as its tokens allow. The longest come first: where memory is
    short, it runs out at once. The batches are put on the mesh of `jax.set_mesh`;
    without one they stay on the host.

    Args:
        examples: from `encode`; their answers are evaluated. Without any, there are no
            batches.
        tokens: of a batch at most, padding included, such as those of a micro-batch of
            training; but a batch has a row for every group of devices.
        sequence_length: of the longest row that is allowed.

    Attributes:
        order: the indices of the examples, in the order of the rows with an example.

    Raises:
        InputError: an example is longer than `sequence_length`.

    Examples:
        >>> import numpy as np
        >>> examples = [Example(np.arange(n), np.arange(n) > 1) for n in (7, 40, 9, 8)]
        >>> batches = HeldOutBatches(examples, tokens=48, sequence_length=512)
        >>> [batch["input_ids"].shape for batch in batches]
        [(1, 40), (3, 16)]
    """

    def __init__(self, examples: Sequence[Example], tokens: int, sequence_length: int):
        lengths = bucket_lengths(examples, 1, sequence_length) if examples else ()
        mesh = jax.sharding.get_mesh()
        groups = group_count(mesh.shape)
        most = -(-len(examples) // groups)  # rows of a group that can be filled

        def rows(length: int) -> int:
            return groups * min(max(tokens // (length * groups), 1), most)

        sizes = [len(example.input_ids) for example in examples]
        self.order = sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True)
        ordered = [examples[i] for i in self.order]
        batches: list[tuple[int, list[Example]]] = []
        while ordered:
            fitting = (n for n in lengths if n >= len(ordered[0].input_ids))
            length = next(fitting, sequence_length)
            batches.append((length, ordered[: rows(length)]))
            ordered = ordered[rows(length) :]
        self._parts = []
        for length, part in groupby(batches, key=lambda batch: batch[0]):
            put = None if mesh.empty else BatchSharder(mesh, rows(length))
            host_batches = evaluation_batches(
                list(chain.from_iterable(filled for _, filled in part)),
                batch_size=rows(length),
                sequence_length=length,
                rows=None if put is None else put.local_rows,
            )
            self._parts.append((host_batches, put))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for host_batches, put in self._parts:
            for batch in host_batches:
                yield batch if put is None else put(batch)
