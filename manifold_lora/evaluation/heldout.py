"""Loss and accuracy on held-out examples, and a few completions to look at."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import P

from manifold_lora.data.tokens import Example
from manifold_lora.distributed.arrays import to_host
from manifold_lora.distributed.groups import copies, divided, each_group
from manifold_lora.distributed.sharding import automatic, constrain
from manifold_lora.evaluation.loss import token_loss


class Evaluation(NamedTuple):
    """Held-out performance."""

    loss: float  # mean −log p of an answer token
    accuracy: float  # share of examples whose greedy completion is the answer


def make_evaluate(
    rebuild: Callable[..., Any], axes: Any
) -> Callable[[Any, Any, Iterable[dict[str, np.ndarray]]], Evaluation]:
    """A function (factors, frozen, batches) → `Evaluation`, compiled once.

    Greedy decoding gives an answer exactly when each of its tokens is the likeliest
    after the true ones, so accuracy needs no generation. The end-of-sequence token
    counts: an answer that does not end is wrong.

    Args:
        rebuild: from `adapters.split`.
        axes: names of the axes of the factors, from `adapters.axes`.
    """

    @each_group
    def sums_of_group(factors, frozen, batch):
        nll, mask, hit = token_loss(rebuild(factors, frozen), batch)
        asked = mask.any(axis=1)
        right = asked & (hit | (mask == 0)).all(axis=1)
        return jnp.stack([nll.sum(), mask.sum(), right.sum(), asked.sum()])

    def sums_of_batch(factors, frozen, batch):
        rows = jax.tree.map(lambda x: x[0], divided(batch))  # in one part
        return sums_of_group(copies(factors, axes), frozen, rows).sum(0)

    @jax.jit
    def sums(factors, frozen, batch):
        return constrain(automatic(sums_of_batch)(factors, frozen, batch), P())

    def evaluate(factors, frozen, batches) -> Evaluation:
        total = np.zeros(4)
        for batch in batches:
            total += np.asarray(sums(factors, frozen, batch), np.float64)
        return Evaluation(float(total[0] / total[1]), float(total[2] / total[3]))

    return evaluate


def majority(train: Sequence[Example], held_out: Sequence[Example]) -> float:
    """Accuracy of always giving the commonest answer of the training examples."""
    commonest = Counter(map(answer, train)).most_common(1)[0][0]
    return float(np.mean([answer(example) == commonest for example in held_out]))


def answer(example: Example) -> tuple[int, ...]:
    """The target tokens of an example."""
    return tuple(example.input_ids[example.loss_mask].tolist())


def complete(
    rebuild: Callable[..., Any],
    factors: Any,
    frozen: Any,
    examples: Sequence[Example],
    stop: Sequence[int],
    max_new_tokens: int = 16,
) -> list[list[int]]:
    """Greedy completions of the examples' prompts, without the stop token.

    For a handful of examples to show: every token runs the whole row again.
    """
    starts = np.array([int(example.loss_mask.argmax()) for example in examples])
    ids = np.zeros((len(examples), starts.max() + max_new_tokens), np.int32)
    for row, example, start in zip(ids, examples, starts, strict=True):
        row[:start] = example.input_ids[:start]

    @jax.jit
    def run(factors, frozen, ids):
        model = rebuild(factors, frozen)

        def extend(step, ids):
            end = starts + step  # what stands after it is unseen: attention is causal
            last = jnp.take_along_axis(
                model.hidden_states(ids), (end - 1)[:, None, None], axis=1
            )
            token = model.unembed(last[:, 0]).argmax(-1).astype(ids.dtype)
            return ids.at[np.arange(len(starts)), end].set(token)

        return jax.lax.fori_loop(0, max_new_tokens, extend, ids)

    completions = []
    for row, start in zip(to_host(run(factors, frozen, ids)), starts, strict=True):
        new = row[start : start + max_new_tokens].tolist()
        end = next((i for i, token in enumerate(new) if token in stop), len(new))
        completions.append(new[:end])
    return completions
