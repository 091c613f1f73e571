"""The loss of targets only, against the loss of all logits in float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from manifold_lora.models import loss
from tests.tolerances import BFLOAT16, FLOAT32

D, VOCABULARY = 8, 50


class Decoder:
    """A model whose hidden states are given."""

    def __init__(self, hidden: jax.Array, head: jax.Array):
        self._hidden, self._head = hidden, head

    def hidden_states(self, *args, **kwargs) -> jax.Array:
        return self._hidden

    def head(self) -> jax.Array:
        return self._head


def batch(rows: int, length: int, share: float) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(rows + length)
    shape = (rows, length)
    ids = rng.integers(0, VOCABULARY, shape)
    mask = (rng.random(shape) < share).astype(np.float32)
    return {"input_ids": ids, "loss_mask": mask, "positions": ids, "segment_ids": ids}


def reference(hidden, head, data) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The loss, what is most likely, and the gradient of the sum to hidden states."""
    h, w = np.asarray(hidden, np.float64), np.asarray(head, np.float64)
    z = h[:, :-1] @ w
    p = np.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    targets, mask = data["input_ids"][:, 1:], data["loss_mask"][:, 1:]
    one_hot = np.eye(VOCABULARY)[targets]
    nll = -np.log((p * one_hot).sum(-1)) * mask
    gradient = np.zeros_like(h)
    gradient[:, :-1] = mask[..., None] * ((p - one_hot) @ w.T)
    return nll, (p.argmax(-1) == targets) & (mask > 0), gradient


@pytest.mark.parametrize("size", [1, 7, 512])
@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loss_and_gradient_are_those_of_all_logits(
    monkeypatch: pytest.MonkeyPatch, dtype: str, share: float, size: int
):
    monkeypatch.setattr(loss, "_chunk_size", lambda n, vocabulary: min(n, size))
    rng = np.random.default_rng(0)
    data = batch(3, 9, share)
    hidden = jnp.asarray(rng.normal(size=(3, 9, D)), dtype)
    head = jnp.asarray(rng.normal(size=(D, VOCABULARY)), dtype)

    def total(h: jax.Array):
        computed = loss.token_loss(Decoder(h, head), data)
        return (computed.nll * 2).sum(), computed

    gradient, computed = jax.jit(jax.grad(total, has_aux=True))(hidden)
    alone = jax.jit(lambda h: loss.token_loss(Decoder(h, head), data))(hidden)
    nll, correct, expected = reference(hidden, head, data)
    tolerance = FLOAT32 if dtype == "float32" else 2 * BFLOAT16
    for result in (computed, alone):
        np.testing.assert_allclose(result.nll, nll, atol=10 * FLOAT32)
        np.testing.assert_array_equal(result.correct, correct)
        np.testing.assert_array_equal(result.mask, data["loss_mask"][:, 1:])
    np.testing.assert_allclose(
        np.asarray(gradient, np.float64), 2 * expected, atol=8 * tolerance
    )


def test_only_the_chunks_of_targets_are_computed(monkeypatch: pytest.MonkeyPatch):
    chunks = []
    original = loss.matmul

    def counted(x: jax.Array, y: jax.Array) -> jax.Array:
        jax.debug.callback(lambda: chunks.append(len(x)))
        return original(x, y)

    monkeypatch.setattr(loss, "matmul", counted)
    monkeypatch.setattr(loss, "_chunk_size", lambda n, vocabulary: 4)
    data = batch(4, 11, 0.0)
    data["loss_mask"][1, 3:9] = 1  # 6 targets: two chunks of 4 of the ten
    hidden, head = jnp.ones((4, 11, D)), jnp.ones((D, VOCABULARY))
    jax.block_until_ready(
        jax.jit(lambda h: loss.token_loss(Decoder(h, head), data))(hidden)
    )
    jax.effects_barrier()
    assert chunks == [4, 4]


def test_chunks_hold_what_they_may():
    assert loss._chunk_size(2000, 49152) == 128
    assert loss._chunk_size(2000, 512) == 512
    assert loss._chunk_size(2000, 10**6) == 64
    assert loss._chunk_size(10, 512) == 10
