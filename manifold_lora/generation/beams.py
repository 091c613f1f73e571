"""Beam search, with the scores and the stopping rule of Hugging Face."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from manifold_lora.generation.config import GenerationConfig
from manifold_lora.generation.decode import is_stop, prefill, seen_tokens
from manifold_lora.generation.sampling import penalise
from manifold_lora.models.cache import Cache

_LOW = -1e9  # below any sum of log-likelihoods, and finite


class _Beams(NamedTuple):
    """The running and the finished beams of a batch; n is the number of beams."""

    cache: Cache  # of b·n rows
    step: jax.Array  # ()
    ids: jax.Array  # (b, n, max_new_tokens) of running beams
    scores: jax.Array  # (b, n), their log-likelihoods, in descending order
    seen: jax.Array  # (b·n, vocab) or (b·n, 0)
    finished_ids: jax.Array  # (b, n, max_new_tokens)
    finished_scores: jax.Array  # (b, n), over length^penalty, in descending order
    finished: jax.Array  # (b, n), True where there is a finished beam
    open: jax.Array  # (b,), True while a running beam may still win


@partial(jax.jit, static_argnames=("graph", "config", "stop", "pad"))
def search(
    graph: Any,
    state: Any,
    input_ids: jax.Array,
    attention_mask: jax.Array,
    *,
    config: GenerationConfig,
    stop: tuple[int, ...],
    pad: int,
) -> jax.Array:
    """The best continuation of every prompt, (b, max_new_tokens), then padding.

    Every step extends each of n running beams by every token and keeps the n best that
    do not stop there. One that stops, or is full, is finished if it is among the n
    best, with the score log p(y) / |y|^penalty. A row ends when its best running beam
    at its present length scores no more than its worst finished one (of n): the rule of
    Hugging Face with early_stopping false.

    Args:
        graph: of the model, from `nnx.split`.
        state: of the model.
        input_ids: (b, t), padded on the left.
        attention_mask: (b, t), nonzero for real tokens.
        config: its `num_beams` is n.
        stop: tokens that finish a beam.
        pad: fills the rows after their end.
    """
    model = nnx.merge(graph, state)
    n, longest = config.num_beams, config.max_new_tokens
    h, cache = prefill(model, input_ids, attention_mask, longest)
    b = len(input_ids)
    real = attention_mask.astype(bool).any(1)
    seen = seen_tokens(input_ids, attention_mask, model.config.vocab_size, config)
    empty = jnp.full((b, n, longest), pad, jnp.int32)
    low = jnp.full((b, n), _LOW, jnp.float32)
    beams = _Beams(
        cache=cache.gather_rows(jnp.repeat(jnp.arange(b), n)),
        step=jnp.zeros((), jnp.int32),
        ids=empty,
        scores=low.at[:, 0].set(0.0),  # all beams are alike: take one of them
        seen=jnp.repeat(seen, n, axis=0),
        finished_ids=empty,
        finished_scores=low,
        finished=jnp.zeros((b, n), bool),
        open=real,
    )
    beams = _extend(model.unembed(jnp.repeat(h, n, axis=0)), beams, config, stop)

    def unfinished(beams: _Beams) -> jax.Array:
        return (beams.step < longest) & beams.open.any()

    def take_step(beams: _Beams) -> _Beams:
        newest = jax.lax.dynamic_slice_in_dim(beams.ids, beams.step - 1, 1, axis=2)
        h, cache = model.extend(newest.reshape(b * n, 1), beams.cache)
        logits = model.unembed(h[:, 0])
        return _extend(logits, beams._replace(cache=cache), config, stop)

    return jax.lax.while_loop(unfinished, take_step, beams).finished_ids[:, 0]


def _extend(
    logits: jax.Array, beams: _Beams, config: GenerationConfig, stop: tuple[int, ...]
) -> _Beams:
    """Extend every beam by one token, given the logits (b·n, vocab)."""
    b, n, _ = beams.ids.shape
    log_p = jax.nn.log_softmax(logits, axis=-1)
    log_p = penalise(log_p, beams.seen, config.repetition_penalty)
    vocab = log_p.shape[-1]
    totals = log_p.reshape(b, n, vocab) + beams.scores[:, :, None]
    # Enough that n remain which do not stop.
    count = min(max(2, 1 + len(stop)) * n, n * vocab)
    scores, flat = jax.lax.top_k(totals.reshape(b, -1), count)
    parents, tokens = flat // vocab, (flat % vocab).astype(jnp.int32)
    ids = jnp.take_along_axis(beams.ids, parents[:, :, None], axis=1)
    ids = jax.lax.dynamic_update_slice_in_dim(ids, tokens[:, :, None], beams.step, 2)
    step = beams.step + 1
    full = step == config.max_new_tokens
    stops = is_stop(tokens, stop) | full  # (b, count)

    running, best = jax.lax.top_k(scores + _LOW * stops, n)
    rows = jnp.take_along_axis(parents, best, axis=1) + n * jnp.arange(b)[:, None]
    seen = beams.seen[rows.reshape(-1)]
    if config.repetition_penalty != 1.0:
        newest = jnp.take_along_axis(tokens, best, axis=1).reshape(-1)
        seen = seen.at[jnp.arange(b * n), newest].set(True)

    finishes = stops & (jnp.arange(count) < n)
    length = step.astype(jnp.float32) ** config.length_penalty
    may_win = finishes & beams.open[:, None]
    final = jnp.where(may_win, scores / length, scores / length + _LOW)
    merged = jnp.concatenate([beams.finished_scores, final], axis=1)
    finished_scores, kept = jax.lax.top_k(merged, n)
    finished = jnp.take_along_axis(
        jnp.concatenate([beams.finished, finishes], axis=1), kept, axis=1
    )
    finished_ids = jnp.take_along_axis(
        jnp.concatenate([beams.finished_ids, ids], axis=1), kept[:, :, None], axis=1
    )
    worst = jnp.where(finished, finished_scores.min(1, keepdims=True), _LOW)
    improves = (running[:, :1] / length > worst).any(1)
    return _Beams(
        cache=beams.cache.gather_rows(rows.reshape(-1)),
        step=step,
        ids=jnp.take_along_axis(ids, best[:, :, None], axis=1),
        scores=running,
        seen=seen,
        finished_ids=finished_ids,
        finished_scores=finished_scores,
        finished=finished,
        open=beams.open & improves,
    )
