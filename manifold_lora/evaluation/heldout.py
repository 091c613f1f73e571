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
from manifold_lora.distributed.groups import (
    replicate_per_group,
    split_batch,
    vmap_over_groups,
)
from manifold_lora.distributed.mesh import group_count
from manifold_lora.distributed.sharding import auto_partitioned, constrain
from manifold_lora.models.loss import token_loss


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

    def sums_of_rows(factors, frozen, batch):
        nll, mask, hit = token_loss(rebuild(factors, frozen), batch)
        asked = mask.any(axis=1)
        right = asked & (hit | (mask == 0)).all(axis=1)
        return jnp.stack([nll.sum(), mask.sum(), right.sum(), asked.sum()])

    sums = _by_groups(sums_of_rows, axes)

    def evaluate(factors, frozen, batches) -> Evaluation:
        total = np.zeros(4)
        for batch in batches:
            total += np.asarray(sums(factors, frozen, batch), np.float64).sum(0)
        return Evaluation(float(total[0] / total[1]), float(total[2] / total[3]))

    return evaluate


def _by_groups(f: Callable[..., Any], axes: Any) -> Callable[..., Any]:
    """`f(factors, frozen, batch)`, compiled, each group of devices on its own rows.

    The results have an axis of groups in front, and are on every device.
    """

    def all_rows(factors, frozen, batch):
        rows = jax.tree.map(lambda x: x[0], split_batch(batch))  # in one part
        return vmap_over_groups(f)(replicate_per_group(factors, axes), frozen, rows)

    @jax.jit
    def run(factors, frozen, batch):
        return constrain(auto_partitioned(all_rows)(factors, frozen, batch), P())

    return run


def majority(train: Sequence[Example], held_out: Sequence[Example]) -> float:
    """Accuracy of always giving the commonest answer of the training examples."""
    commonest = Counter(map(answer, train)).most_common(1)[0][0]
    return float(np.mean([answer(example) == commonest for example in held_out]))


def answer(example: Example) -> tuple[int, ...]:
    """The target tokens of an example."""
    return tuple(example.input_ids[example.loss_mask].tolist())


def complete(
    rebuild: Callable[..., Any],
    axes: Any,
    factors: Any,
    frozen: Any,
    examples: Sequence[Example],
    stop: Sequence[int],
    max_new_tokens: int = 16,
) -> list[list[int]]:
    """Greedy completions of the examples' prompts, without the stop token.

    For a handful of examples to show: every token runs the whole row again.
    """
    prompts = [example.input_ids[: example.loss_mask.argmax()] for example in examples]
    groups = group_count(jax.sharding.get_mesh().shape)
    # Every group gets as many rows: some are added, whose completions nobody reads.
    rows = [*prompts, *prompts[:1] * (-len(prompts) % groups)]
    starts = np.array([len(row) for row in rows])
    ids = np.zeros((len(rows), starts.max() + max_new_tokens), np.int32)
    for row, prompt in zip(ids, rows, strict=True):
        row[: len(prompt)] = prompt

    def extended(factors, frozen, batch):
        model, (ids, starts) = rebuild(factors, frozen), batch

        def extend(step, ids):
            end = starts + step  # what stands after it is unseen: attention is causal
            last = jnp.take_along_axis(
                model.hidden_states(ids), (end - 1)[:, None, None], axis=1
            )
            token = model.unembed(last[:, 0]).argmax(-1).astype(ids.dtype)
            return ids.at[jnp.arange(len(starts)), end].set(token)

        return jax.lax.fori_loop(0, max_new_tokens, extend, ids)

    found = to_host(_by_groups(extended, axes)(factors, frozen, (ids, starts)))
    completions = []
    for row, prompt in zip(found.reshape(ids.shape), prompts, strict=False):
        new = row[len(prompt) :][:max_new_tokens].tolist()
        end = next((i for i, token in enumerate(new) if token in stop), len(new))
        completions.append(new[:end])
    return completions
