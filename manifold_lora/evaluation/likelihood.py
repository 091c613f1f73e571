"""Log-likelihoods of continuations, batched by length and compiled a few times."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from manifold_lora.distributed.arrays import to_host
from manifold_lora.distributed.mesh import group_count
from manifold_lora.evaluation.heldout import jit_over_groups
from manifold_lora.evaluation.systems import System

Tokens = tuple[int, ...]


class Likelihood(NamedTuple):
    """How likely a continuation is."""

    logprob: float  # natural logarithm of its probability after the context
    greedy: bool  # whether each of its tokens is the most likely one


class Likelihoods:
    """Computes log p(continuation | context) for many pairs of token sequences.

    Rows are right-padded to one of few lengths (32, 48, 64, 96, 128, …), so that few
    programs are compiled. Continuations that differ in their last token only, as the
    labels of a multiple choice often do, share a row.

    Args:
        system: the model.
        batch_size: rows of a batch.
    """

    def __init__(self, system: System, batch_size: int):
        groups = group_count(jax.sharding.get_mesh().shape)
        self.rows = -(-batch_size // groups) * groups
        self._system = system
        self._run = _compiled(system)

    def __call__(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> list[Likelihood]:
        """The likelihoods of (context, continuation) pairs, neither of them empty."""
        # By the tokens that a row feeds: the pairs, with their last tokens.
        shared: dict[tuple[Tokens, int], dict[int, list[int]]] = {}
        for index, (context, continuation) in enumerate(pairs):
            ids = (*context, *continuation)
            ends = shared.setdefault((ids[:-1], len(context)), {})
            ends.setdefault(ids[-1], []).append(index)
        results: dict[int, Likelihood] = {}
        ordered = sorted(shared, key=lambda row: len(row[0]), reverse=True)
        for start in range(0, len(ordered), self.rows):
            rows = ordered[start : start + self.rows]
            batch = _batch(rows, [[*shared[row]] for row in rows], self.rows)
            logprob, greedy = (x.reshape(self.rows, -1) for x in self._apply(batch))
            for i, row in enumerate(rows):
                for k, indices in enumerate(shared[row].values()):
                    found = Likelihood(float(logprob[i, k]), bool(greedy[i, k]))
                    results |= dict.fromkeys(indices, found)
        return [results[index] for index in range(len(pairs))]

    def _apply(self, batch: Mapping[str, np.ndarray]) -> Iterator[np.ndarray]:
        outputs = self._run(self._system.factors, self._system.frozen, batch)
        return map(np.asarray, to_host(outputs))


def bucket(size: int) -> int:
    """The least length of a row, of 1, 2, 3, 4, 6, 8, 12, …, that holds so many.

    >>> [bucket(n) for n in (1, 5, 33, 97)]
    [1, 6, 48, 128]
    """
    power = 1 << (size - 1).bit_length()
    return power // 4 * 3 if size <= power // 4 * 3 else power


def _batch(
    rows: Sequence[tuple[Tokens, int]], ends: Sequence[Sequence[int]], count: int
) -> dict[str, np.ndarray]:
    """The arrays of a batch; the window of a row ends at its last token.

    `ids` (rows, t); `start` (rows,) the first position of the window; `targets` and
    `mask` (rows, window) the continuation but for its last token; `last` (rows, k) the
    alternatives for that one.
    """
    length = max(32, bucket(max(len(ids) for ids, _ in rows)))
    window = min(bucket(max(len(ids) - n + 1 for ids, n in rows)), length)
    batch = {
        "ids": np.zeros((count, length), np.int32),
        "start": np.zeros(count, np.int32),
        "end": np.zeros(count, np.int32),
        "targets": np.zeros((count, window), np.int32),
        "mask": np.zeros((count, window), bool),
        "last": np.zeros((count, bucket(max(map(len, ends)))), np.int32),
    }
    for i, ((ids, context), alternatives) in enumerate(zip(rows, ends, strict=True)):
        start = max(len(ids) - window, 0)
        batch["ids"][i, : len(ids)] = ids
        batch["start"][i] = start
        batch["end"][i] = len(ids) - 1 - start  # in the window
        inner = np.arange(context - 1, len(ids) - 1)
        batch["targets"][i, inner - start] = ids[context:]
        batch["mask"][i, inner - start] = True
        batch["last"][i, : len(alternatives)] = alternatives
    return batch


def _compiled(system: System) -> Any:
    """The function (factors, frozen, batch) → logprob and greedy, (rows, k)."""

    def likelihoods(factors, frozen, batch):
        model = system.rebuild(factors, frozen)
        hidden = model.hidden_states(batch["ids"])  # (b, t, d); padding comes later
        head, window = model.head(), batch["targets"].shape[1]

        def row(x):
            hidden, batch = x
            h = jax.lax.dynamic_slice_in_dim(hidden, batch["start"], window)
            logits = model.unembed(h, head)  # (window, vocab)
            norm, most = jax.nn.logsumexp(logits, axis=-1), logits.max(axis=-1)
            inner = jnp.take_along_axis(logits, batch["targets"][:, None], 1)[:, 0]
            mask, end = batch["mask"], batch["end"]
            last = logits[end][batch["last"]]  # (k,)
            logprob = jnp.where(mask, inner - norm, 0).sum() + last - norm[end]
            greedy = jnp.where(mask, inner >= most, True).all() & (last >= most[end])
            return logprob, greedy

        return jax.lax.map(row, (hidden, batch))

    return jit_over_groups(likelihoods, system.axes)
