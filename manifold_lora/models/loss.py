"""The loss of target tokens, shared by training, evaluation and planning."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike


class TokenLoss(NamedTuple):
    """The loss of each target token of a batch, predicted from the tokens before it."""

    nll: Array  # (b, t − 1) float32, −log p, 0 where the token is not a target
    mask: Array  # (b, t − 1) float32, 1 for targets
    correct: Array  # (b, t − 1) bool, the target is the most likely token


def token_loss(
    model: Any, batch: Mapping[str, ArrayLike], key: Array | None = None
) -> TokenLoss:
    """Negative log-likelihood of every target token of a batch.

    Reduction is left to the caller: a batch's loss is the sum over all micro-batches,
    divided once by the number of targets.

    Args:
        model: with `hidden_states`, `head` and `unembed`, such as `Llama`.
        batch: `input_ids`, `loss_mask`, `positions` and `segment_ids`, each (b, t).
        key: dropout key, one for all rows or one per row, (b,); None disables dropout.
    """
    targets = jnp.asarray(batch["input_ids"])[:, 1:]
    mask = jnp.asarray(batch["loss_mask"])[:, 1:]
    hidden = model.hidden_states(
        batch["input_ids"],
        positions=batch["positions"],
        segment_ids=batch["segment_ids"],
        key=key,
    )[:, :-1]  # (b, t − 1, d)

    head = model.head()  # all-gathered once for all rows

    # One row at a time, rematerialised in the backward pass: the logits of a batch
    # would be the largest array (4 GiB for 16 rows of 512 tokens, vocabulary 128k).
    @jax.checkpoint
    def row(hidden_and_targets):
        h, target = hidden_and_targets  # (t − 1, d), (t − 1,)
        logits = model.unembed(h, head)  # (t − 1, vocab)
        target_logit = jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0]
        nll = jax.nn.logsumexp(logits, axis=-1) - target_logit
        return nll, target_logit >= logits.max(axis=-1)

    nll, correct = jax.lax.map(row, (hidden, targets))
    return TokenLoss(jnp.where(mask > 0, nll, 0), mask, correct)
