"""Loss, accuracy and exact match on held-out examples."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import P

from manifold_lora.data.tokens import Example
from manifold_lora.distributed.groups import (
    replicate_per_group,
    split_batch,
    vmap_over_groups,
)
from manifold_lora.distributed.sharding import auto_partitioned, constrain
from manifold_lora.models.loss import token_loss


class Evaluation(NamedTuple):
    """Measures of how well the answers of held-out examples are predicted.

    >>> Evaluation(loss=0.0, accuracy=1.0, exact_match=1.0).perplexity
    1.0
    """

    loss: float  # mean negative log-likelihood per answer token
    accuracy: float  # share of the answer tokens that are the most likely ones
    exact_match: float  # share of the examples of which all answer tokens are

    @property
    def perplexity(self) -> float:
        """The exponential of the loss."""
        return math.exp(min(self.loss, 709.0))  # beyond it, float64 overflows


def make_evaluate(
    rebuild: Callable[..., Any], axes: Any
) -> Callable[[Any, Any, Iterable[Mapping[str, Any]]], Evaluation]:
    """Make a function (factors, frozen, batches) → `Evaluation`.

    It is compiled once for each shape of a batch. Greedy decoding yields the answer
    exactly if each of its tokens is the most likely one given the true tokens before
    it, so an exact match needs no generation. The end-of-sequence token counts: an
    answer that does not end there is incorrect.

    One batch is evaluated at a time, while the next is made: with the batches of
    `HeldOutBatches` it takes no more memory than a training step. The sums of the rows
    are added up in float64, so that they do not depend on how rows are batched.

    Args:
        rebuild: from `adapters.split`.
        axes: logical axes of the factors, from `adapters.axes`.
    """
    sums = evaluation_sums(rebuild, axes)

    def evaluate(factors, frozen, batches) -> Evaluation:
        rows = row_sums(sums, factors, frozen, batches)
        total = sum((x.sum(0) for x in rows), np.zeros(5))
        nll, tokens, correct, answers, exact = total.tolist()
        return Evaluation(nll / tokens, correct / tokens, exact / answers)

    return evaluate


def row_sums(
    sums: Callable[..., Any],
    factors: Any,
    frozen: Any,
    batches: Iterable[Mapping[str, Any]],
) -> Iterator[np.ndarray]:
    """What `evaluation_sums` gives for the rows of each batch, (rows, 5) float64."""
    pending = None
    for batch in batches:
        if pending is not None:  # waits, so that one batch at a time is evaluated
            yield _rows(pending)
        pending = sums(factors, frozen, batch)
    if pending is not None:
        yield _rows(pending)


def evaluation_sums(rebuild: Callable[..., Any], axes: Any) -> Any:
    """The compiled sums over the answer of every row, (groups, rows per group, 5).

    They are the negative log-likelihood, the number of answer tokens, of those that are
    the most likely ones, and 1 or 0 for a row with an answer and with an exact match.
    """

    def sums_over_answers(factors, frozen, batch):
        nll, mask, hit = token_loss(rebuild(factors, frozen), batch)
        tokens, correct = mask.sum(1), (mask * hit).sum(1)
        has_answer = tokens > 0
        exact = has_answer & (correct == tokens)
        sums = (nll.sum(1), tokens, correct, has_answer, exact)
        return jnp.stack([x.astype(jnp.float32) for x in sums], axis=-1)

    return jit_over_groups(sums_over_answers, axes)


def _rows(sums: Any) -> np.ndarray:
    return np.asarray(sums, np.float64).reshape(-1, 5)


def jit_over_groups(f: Callable[..., Any], axes: Any) -> Callable[..., Any]:
    """Jit `f(factors, frozen, batch)` such that each device group maps its own rows.

    The results have a leading axis of groups and are replicated on all devices.
    """

    def all_rows(factors, frozen, batch):
        rows = jax.tree.map(lambda x: x[0], split_batch(batch))  # one micro-batch
        return vmap_over_groups(f)(replicate_per_group(factors, axes), frozen, rows)

    @jax.jit
    def run(factors, frozen, batch):
        return constrain(auto_partitioned(all_rows)(factors, frozen, batch), P())

    return run


def majority(train: Sequence[Example], held_out: Sequence[Example]) -> float:
    """Exact match of always giving the most common answer of the training set."""
    most_common = Counter(map(answer, train)).most_common(1)[0][0]
    return float(np.mean([answer(example) == most_common for example in held_out]))


def answer(example: Example) -> tuple[int, ...]:
    """The tokens of the answer, or of all answers of a chat with several."""
    return tuple(example.input_ids[example.answer_mask].tolist())


def first_turn(example: Example) -> tuple[np.ndarray, np.ndarray]:
    """The prompt before the first answer, and that answer.

    >>> example = Example(np.arange(6), np.array([0, 0, 1, 1, 0, 1], bool))
    >>> [tokens.tolist() for tokens in first_turn(example)]
    [[0, 1], [2, 3]]
    """
    start = int(example.answer_mask.argmax())
    length = int(np.append(~example.answer_mask[start:], True).argmax())
    return example.input_ids[:start], example.input_ids[start : start + length]
