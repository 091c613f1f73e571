"""The decoding loop: one token a step for every row, greedily or by sampling."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from manifold_lora.generation.config import GenerationConfig
from manifold_lora.generation.sampling import choose, penalise
from manifold_lora.models.cache import Cache


class Decoding(NamedTuple):
    """The state of a batch between steps."""

    cache: Cache
    new_ids: jax.Array  # (b, max_new_tokens)
    step: jax.Array  # (), the number of columns that are filled
    done: jax.Array  # (b,), True for rows that have stopped
    seen: jax.Array  # (b, vocab), tokens that are penalised; (b, 0) without a penalty
    keys: jax.Array  # (b,), of sampling


@partial(jax.jit, static_argnames=("graph", "config", "stop", "pad"))
def begin(
    graph: Any,
    state: Any,
    input_ids: jax.Array,
    attention_mask: jax.Array,
    seeds: tuple[Any, Any],
    *,
    config: GenerationConfig,
    stop: tuple[int, ...],
    pad: int,
) -> Decoding:
    """Run the prompts, (b, t) with padding on the left, and choose the first tokens.

    Rows without a real token have stopped from the beginning. The seeds are that of all
    and an index of each row, (b,).
    """
    model = nnx.merge(graph, state)
    h, cache = prefill(model, input_ids, attention_mask, config.max_new_tokens)
    b = input_ids.shape[0]
    done = ~attention_mask.astype(bool).any(1)
    new_ids = jnp.full((b, config.max_new_tokens), pad, jnp.int32)
    seen = seen_tokens(input_ids, attention_mask, model.config.vocab_size, config)
    zero = jnp.zeros((), jnp.int32)
    seed, indices = seeds
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), indices)
    first = Decoding(cache, new_ids, zero, done, seen, keys)
    return _choose(model.unembed(h), first, config, stop, pad)


def prefill(
    model: Any, input_ids: jax.Array, attention_mask: jax.Array, max_new_tokens: int
) -> tuple[jax.Array, Cache]:
    """The hidden state of each prompt's last token, (b, d), and a cache with them."""
    b, t = input_ids.shape
    cache = Cache.empty(
        model.config,
        rows=b,
        length=t + max_new_tokens,
        dtype=model.embed_tokens.dtype,
    )
    h, cache = model.extend(input_ids, cache, attention_mask)
    return h[:, -1], cache


def seen_tokens(
    input_ids: jax.Array, mask: jax.Array, vocab: int, config: GenerationConfig
) -> jax.Array:
    """The tokens of each prompt, (b, vocab) bool; (b, 0) if none is penalised."""
    b = input_ids.shape[0]
    if config.repetition_penalty == 1.0:
        return jnp.zeros((b, 0), bool)
    seen = jnp.zeros((b, vocab), bool)
    return seen.at[jnp.arange(b)[:, None], input_ids].max(mask.astype(bool))


@partial(
    jax.jit,
    static_argnames=("graph", "config", "stop", "pad"),
    donate_argnames=("decoding",),
)
def advance(
    graph: Any,
    state: Any,
    decoding: Decoding,
    steps: jax.Array | int,
    *,
    config: GenerationConfig,
    stop: tuple[int, ...],
    pad: int,
) -> Decoding:
    """Take at most so many steps, until all rows have stopped or are full."""
    model = nnx.merge(graph, state)
    last = jnp.minimum(decoding.step + steps, config.max_new_tokens)

    def unfinished(decoding: Decoding) -> jax.Array:
        return (decoding.step < last) & ~decoding.done.all()

    def take_step(decoding: Decoding) -> Decoding:
        newest = jax.lax.dynamic_slice_in_dim(
            decoding.new_ids, decoding.step - 1, 1, axis=1
        )
        h, cache = model.extend(newest, decoding.cache)
        logits = model.unembed(h[:, 0])
        return _choose(logits, decoding._replace(cache=cache), config, stop, pad)

    return jax.lax.while_loop(unfinished, take_step, decoding)


def _choose(
    logits: jax.Array,
    decoding: Decoding,
    config: GenerationConfig,
    stop: tuple[int, ...],
    pad: int,
) -> Decoding:
    """Append the next token of every row; rows that have stopped get padding."""
    logits = penalise(logits, decoding.seen, config.repetition_penalty)
    keys = jax.vmap(jax.random.fold_in, (0, None))(decoding.keys, decoding.step)
    tokens = jnp.where(decoding.done, pad, choose(logits, config, keys))
    seen = decoding.seen
    if config.repetition_penalty != 1.0:
        seen = seen.at[jnp.arange(len(tokens)), tokens].set(True)
    return decoding._replace(
        new_ids=jax.lax.dynamic_update_slice_in_dim(
            decoding.new_ids, tokens[:, None], decoding.step, axis=1
        ),
        step=decoding.step + 1,
        done=decoding.done | is_stop(tokens, stop),
        seen=seen,
    )


def is_stop(tokens: jax.Array, stop: tuple[int, ...]) -> jax.Array:
    """True where the token is one of these; the shape of `tokens`."""
    return jnp.isin(tokens, jnp.asarray(stop, jnp.int32))
