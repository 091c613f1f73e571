"""Choose the next token of every row: greedily, or by sampling."""

import jax
import jax.numpy as jnp

from manifold_lora.generation.config import GenerationConfig


def penalise(logits: jax.Array, seen: jax.Array, penalty: float) -> jax.Array:
    """The repetition penalty θ of CTRL (Keskar et al. 2019): x/θ if x > 0, else xθ.

    Args:
        logits: (b, vocab).
        seen: (b, vocab), True for tokens that are in the prompt or were generated.
        penalty: θ; 1 changes nothing.
    """
    if penalty == 1.0:
        return logits
    penalised = jnp.where(logits < 0, logits * penalty, logits / penalty)
    return jnp.where(seen, penalised, logits)


def choose(logits: jax.Array, config: GenerationConfig, keys: jax.Array) -> jax.Array:
    """The next tokens, (b,) int32, for logits (b, vocab) and a key for each row.

    Greedy at temperature 0. Otherwise a sample from softmax(logits / temperature),
    restricted by top-k, top-p (Holtzman et al. 2020) and min-p (Nguyen et al. 2024) in
    this order, as in Hugging Face.
    """
    if not config.temperature:
        return logits.argmax(-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys, restrict(logits, config)).astype(
        jnp.int32
    )


def restrict(logits: jax.Array, config: GenerationConfig) -> jax.Array:
    """Logits over the temperature, -inf for tokens that are not to be sampled."""
    logits = logits / config.temperature
    if config.top_k is not None:
        k = min(config.top_k, logits.shape[-1])
        least = jax.lax.top_k(logits, k)[0][..., -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if config.top_p < 1:
        ascending = jnp.sort(logits, axis=-1)
        below = jnp.cumsum(jax.nn.softmax(ascending, axis=-1), axis=-1)
        dropped = (below <= 1 - config.top_p).sum(-1, keepdims=True)
        last = logits.shape[-1] - 1  # one token always stays
        least = jnp.take_along_axis(ascending, jnp.minimum(dropped, last), axis=-1)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if config.min_p > 0:
        p = jax.nn.softmax(logits, axis=-1)
        least = config.min_p * p.max(-1, keepdims=True)
        logits = jnp.where(p < least, -jnp.inf, logits)
    return logits
