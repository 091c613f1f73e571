"""Loss and accuracy on held-out examples, and sample completions."""

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
    """Metrics on held-out examples."""

    loss: float  # mean negative log-likelihood per answer token
    accuracy: float  # fraction of examples whose greedy completion is the answer


def make_evaluate(
    rebuild: Callable[..., Any], axes: Any
) -> Callable[[Any, Any, Iterable[dict[str, np.ndarray]]], Evaluation]:
    """Make a function (factors, frozen, batches) → `Evaluation`, compiled once.

    Greedy decoding yields the answer exactly if each of its tokens has the highest
    probability given the true tokens before it, so accuracy needs no generation. The
    end-of-sequence token counts: an answer that does not end there is incorrect.

    Args:
        rebuild: from `adapters.split`.
        axes: logical axes of the factors, from `adapters.axes`.
    """

    def sums_over_rows(factors, frozen, batch):
        nll, mask, hit = token_loss(rebuild(factors, frozen), batch)
        has_answer = mask.any(axis=1)
        correct = has_answer & (hit | (mask == 0)).all(axis=1)
        return jnp.stack([nll.sum(), mask.sum(), correct.sum(), has_answer.sum()])

    sums = _jit_over_groups(sums_over_rows, axes)

    def evaluate(factors, frozen, batches) -> Evaluation:
        total = np.zeros(4)
        for batch in batches:
            total += np.asarray(sums(factors, frozen, batch), np.float64).sum(0)
        return Evaluation(float(total[0] / total[1]), float(total[2] / total[3]))

    return evaluate


def _jit_over_groups(f: Callable[..., Any], axes: Any) -> Callable[..., Any]:
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
    """Accuracy of always predicting the most common answer of the training set."""
    most_common = Counter(map(answer, train)).most_common(1)[0][0]
    return float(np.mean([answer(example) == most_common for example in held_out]))


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

    For a handful of samples: it keeps no cache and recomputes the row for every token.
    """
    prompts = [example.input_ids[: example.loss_mask.argmax()] for example in examples]
    groups = group_count(jax.sharding.get_mesh().shape)
    # Every group needs the same number of rows; completions of the padding are dropped.
    rows = [*prompts, *prompts[:1] * (-len(prompts) % groups)]
    lengths = np.array([len(row) for row in rows])
    ids = np.zeros((len(rows), lengths.max() + max_new_tokens), np.int32)
    for row, prompt in zip(ids, rows, strict=True):
        row[: len(prompt)] = prompt

    def generated(factors, frozen, batch):
        model, (ids, lengths) = rebuild(factors, frozen), batch

        def extend(step, ids):
            end = lengths + step  # later positions are masked: attention is causal
            last = jnp.take_along_axis(
                model.hidden_states(ids), (end - 1)[:, None, None], axis=1
            )
            token = model.unembed(last[:, 0]).argmax(-1).astype(ids.dtype)
            return ids.at[jnp.arange(len(lengths)), end].set(token)

        return jax.lax.fori_loop(0, max_new_tokens, extend, ids)

    outputs = _jit_over_groups(generated, axes)(factors, frozen, (ids, lengths))
    completions = []
    all_ids = to_host(outputs).reshape(ids.shape)
    for row, prompt in zip(all_ids, prompts, strict=False):
        new = row[len(prompt) :][:max_new_tokens].tolist()
        end = next((i for i, token in enumerate(new) if token in stop), len(new))
        completions.append(new[:end])
    return completions
