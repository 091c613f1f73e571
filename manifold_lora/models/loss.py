"""The loss of answer tokens, the same in training and in evaluation."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike


class TokenLoss(NamedTuple):
    """What a batch's target tokens cost, each from the tokens before it."""

    nll: Array  # (b, t − 1) float32, −log p, 0 where the token is no target
    mask: Array  # (b, t − 1) float32, 1 for targets
    hit: Array  # (b, t − 1) bool, the target is the likeliest token


def token_loss(
    model: Any, batch: Mapping[str, ArrayLike], key: Array | None = None
) -> TokenLoss:
    """Negative log-likelihood of every target token of a batch.

    Sums are left to the caller: a loss is the sum over all parts of a batch, divided
    once by the number of targets.
    """
    targets = jnp.asarray(batch["input_ids"])[:, 1:]
    mask = jnp.asarray(batch["loss_mask"])[:, 1:]
    hidden = model.hidden_states(
        batch["input_ids"],
        positions=batch["positions"],
        segment_ids=batch["segment_ids"],
        key=key,
    )[:, :-1]  # (b, t − 1, d)

    head = model.head()  # once for all rows

    # Row by row, and again in the backward pass: the logits of a whole batch would
    # be the largest array of all (4 GiB for 16 rows of 512 and 128k words).
    @jax.checkpoint
    def row(hidden_and_targets):
        h, target = hidden_and_targets  # (t − 1, d), (t − 1,)
        logits = model.unembed(h, head)  # (t − 1, vocab)
        chosen = jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0]
        nll = jax.nn.logsumexp(logits, axis=-1) - chosen
        return nll, chosen >= logits.max(axis=-1)

    nll, hit = jax.lax.map(row, (hidden, targets))
    return TokenLoss(jnp.where(mask > 0, nll, 0), mask, hit)
