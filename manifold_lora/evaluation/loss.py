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
    logits = model(
        batch["input_ids"],
        positions=batch["positions"],
        segment_ids=batch["segment_ids"],
        key=key,
    )[:, :-1]  # (b, t − 1, vocab)
    targets = jnp.asarray(batch["input_ids"])[:, 1:]
    mask = jnp.asarray(batch["loss_mask"])[:, 1:]
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    nll = jax.nn.logsumexp(logits, axis=-1) - chosen
    hit = chosen >= logits.max(axis=-1)
    return TokenLoss(jnp.where(mask > 0, nll, 0), mask, hit)
