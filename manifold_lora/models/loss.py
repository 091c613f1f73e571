"""The loss of target tokens, shared by training, evaluation and planning."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from manifold_lora.models.precision import matmul

# Bytes of the logits that exist at a time; accelerators need products of more rows.
_CPU_LOGITS, _LOGITS = 2**25, 2**28


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
    divided once by the number of targets. The head is frozen: it gets no gradient.

    Args:
        model: with `hidden_states` and `head`, such as `Llama`.
        batch: `input_ids`, `loss_mask`, `positions` and `segment_ids`, each (b, t);
            without segments, None in their place, rows hold one sequence each.
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
    head = jax.lax.stop_gradient(model.head())  # all-gathered once for all chunks
    nll, correct = _target_loss(
        hidden.reshape(-1, hidden.shape[-1]),
        targets.reshape(-1),
        mask.reshape(-1) > 0,
        head,
    )
    return TokenLoss(nll.reshape(mask.shape), mask, correct.reshape(mask.shape))


@jax.custom_vjp
def _target_loss(h: Array, targets: Array, mask: Array, head: Array):
    """−log p(target) and whether it is the most likely token, 0 and False elsewhere.

    Only targets are multiplied with the head, in chunks, of which there are as many as
    the batch needs. With z = h W and p = softmax(z), the gradient of −log p_y is
    (p − e_y) Wᵀ. It is computed in the same pass, so that no logits are kept or
    computed twice.

    Args:
        h: (n, d).
        targets: (n,).
        mask: (n,) bool.
        head: W, (d, vocab).

    Returns:
        Two of (n,), float32 and bool.
    """
    nll, correct, _ = _over_targets(h, targets, mask, head, gradient=False)
    return nll, correct


def _forward(h: Array, targets: Array, mask: Array, head: Array):
    nll, correct, dh = _over_targets(h, targets, mask, head, gradient=True)
    return (nll, correct), dh


def _backward(dh: Array, cotangents: Any):
    return (cotangents[0][:, None] * dh).astype(dh.dtype), None, None, None


_target_loss.defvjp(_forward, _backward)


def _over_targets(h: Array, targets: Array, mask: Array, head: Array, gradient: bool):
    """−log p, whether the target is the most likely, and d(−log p)/dh or None."""
    n = len(h)
    size = _chunk_size(n, head.shape[1])
    (rows,) = jnp.nonzero(mask, size=-(-n // size) * size, fill_value=n)

    def chunk(i: Array, carry: Any):
        nll, correct, dh = carry
        at = jax.lax.dynamic_slice_in_dim(rows, i * size, size)  # n beyond the last
        x = h.at[at].get(mode="fill", fill_value=0)
        y = targets.at[at].get(mode="fill", fill_value=0)
        z = matmul(x, head)  # (size, vocab) float32
        target = jnp.take_along_axis(z, y[:, None], axis=-1)
        largest = z.max(-1, keepdims=True)
        exp = jnp.exp(z - largest)
        total = exp.sum(-1, keepdims=True)
        loss = jnp.log(total) + largest - target
        nll = nll.at[at].set(loss[:, 0], mode="drop")
        correct = correct.at[at].set((target >= largest)[:, 0], mode="drop")
        if gradient:
            one_hot = jnp.arange(z.shape[-1]) == y[:, None]
            dz = (exp / total - one_hot).astype(head.dtype)
            dx = matmul(dz, head.T).astype(h.dtype)
            dh = dh.at[at].set(dx, mode="drop")
        return nll, correct, dh

    start = (jnp.zeros(n), jnp.zeros(n, bool), jnp.zeros_like(h) if gradient else None)
    chunks = (mask.sum() + size - 1) // size
    with jax.named_scope(
        f"at_most_{len(rows) // size}_trips"
    ):  # read by `planning.hlo`
        return jax.lax.fori_loop(0, chunks, chunk, start)


def _chunk_size(n: int, vocabulary: int) -> int:
    """Rows whose logits take what they may: a power of two from 64 to 512."""
    limit = _CPU_LOGITS if jax.default_backend() == "cpu" else _LOGITS
    rows = min(max(64, limit // (4 * vocabulary)), 512)
    return min(n, 1 << (rows.bit_length() - 1))
