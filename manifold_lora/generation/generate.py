"""Generate token ids from token ids."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from manifold_lora.distributed.arrays import to_host
from manifold_lora.distributed.mesh import group_count
from manifold_lora.errors import InputError
from manifold_lora.generation import beams, decode
from manifold_lora.generation.config import GenerationConfig
from manifold_lora.generation.padding import bucket, pad_left
from manifold_lora.models import Llama

# A row may be told to stop, between steps: `(new ids (b, n), done (b,)) -> done`.
Monitor = Callable[[np.ndarray, np.ndarray], np.ndarray]


def generate(
    model: Llama,
    input_ids: Any,
    *,
    attention_mask: Any = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    num_beams: int = 1,
    stop_tokens: Sequence[int] | None = None,
    **options: Any,
) -> np.ndarray:
    """Continue every row of token ids: greedily, by sampling, or by beam search.

    With a static key-value cache. The program is compiled once for each number of rows
    and each bucket of lengths, not for each length: prompts are padded on the left to
    the next multiple of a quarter of a power of two. For many prompts of different
    lengths use `generate_batches`; for text, the command `manifold-lora generate`.

    Args:
        model: with or without adapters; their dropout does not apply.
        input_ids: (b, t) integers.
        attention_mask: (b, t), nonzero for real tokens, which may be padded on either
            side; by default all are.
        max_new_tokens: columns of the result.
        temperature: 0 is greedy, the most likely token of each step.
        num_beams: of a beam search, with temperature 0.
        stop_tokens: that end a row; None, the model's `eos_token_id`; (), none.
        options: further fields of `GenerationConfig`: top_k, top_p, min_p,
            repetition_penalty, length_penalty, seed.

    Returns:
        The new ids, (b, max_new_tokens) int32: a stop token stands where the row ends,
        and padding after it (the model's pad token, else the first stop token, else 0).

    Raises:
        InputError: an option out of range, an id without a row in the embedding, or
            more tokens than the model's context.

    Examples:
        >>> from manifold_lora.models import LlamaConfig
        >>> config = LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=16,
        ...     num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        ...     head_dim=4)
        >>> model = Llama(config, rngs=nnx.Rngs(0))
        >>> generate(model, [[1, 2, 3]], max_new_tokens=4, stop_tokens=()).shape
        (1, 4)
    """
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        num_beams=num_beams,
        **options,
    )
    ids, mask = _as_rows(input_ids, attention_mask)
    return Generator(model, config, stop_tokens)(ids, mask)


@dataclasses.dataclass(frozen=True)
class Generator:
    """A model with the settings of its generation, for several batches.

    `generate` is simpler for one. Compiled programs are shared by all generators of
    equal models and settings.

    Args:
        model: with or without adapters.
        config: how tokens are chosen.
        stop_tokens: None, the model's own.
    """

    model: Llama
    config: GenerationConfig
    stop_tokens: Sequence[int] | None = None

    @property
    def stop(self) -> tuple[int, ...]:
        """The tokens that end a row, in order."""
        own = self.model.config.eos_token_id
        chosen = own if self.stop_tokens is None else self.stop_tokens
        return tuple(int(token) for token in dict.fromkeys(chosen))

    @property
    def pad(self) -> int:
        """The token after the end of a row."""
        own = self.model.config.pad_token_id
        if own is not None and own >= 0:
            return own
        return self.stop[0] if self.stop else 0

    def __call__(
        self,
        ids: np.ndarray,
        mask: np.ndarray,
        *,
        indices: np.ndarray | None = None,
        monitor: Monitor | None = None,
        every: int = 1,
    ) -> np.ndarray:
        """The new ids of a batch, (b, max_new_tokens) int32.

        Args:
            ids: (b, t).
            mask: (b, t), nonzero for real tokens.
            indices: of the rows, (b,), which with the seed decide what is sampled; by
                default their order.
            monitor: called after every few steps; not for a beam search.
            every: steps between its calls.

        Raises:
            InputError: an id without a row in the embedding, too many tokens, or a
                monitor with beams.
        """
        self._check(ids, mask)
        b = len(ids)
        indices = np.arange(b) if indices is None else indices
        rows = -(-b // _groups()) * _groups()
        length = bucket(max(int(mask.astype(bool).sum(1).max(initial=1)), 1))
        ids, mask = pad_left(ids, mask, rows, length)
        graph, state = nnx.split(self.model)
        options: dict[str, Any] = {"stop": self.stop, "pad": self.pad}
        # The seed is an argument: other samples need no compilation.
        options["config"] = dataclasses.replace(self.config, seed=0)
        if self.config.num_beams > 1:
            if monitor is not None:
                raise InputError(
                    "A beam search has its tokens at the end: leave out streaming and "
                    "stop strings, or set num_beams to 1."
                )
            found = beams.search(graph, state, ids, mask, **options)
            return to_host(found)[:b]
        seeds = (
            np.uint32(self.config.seed),
            np.resize(indices, rows).astype(np.uint32),
        )
        decoding = decode.begin(graph, state, ids, mask, seeds, **options)
        steps = self.config.max_new_tokens if monitor is None else every
        while True:
            if monitor is not None:
                new = to_host((decoding.new_ids, decoding.step, decoding.done))
                done = new[2].copy()
                done[:b] = monitor(new[0][:b, : new[1]], done[:b])
                decoding = decoding._replace(done=done)
                if done.all() or new[1] == self.config.max_new_tokens:
                    break
            decoding = decode.advance(graph, state, decoding, steps, **options)
            if monitor is None:
                break
        return to_host(decoding.new_ids)[:b]

    def _check(self, ids: np.ndarray, mask: np.ndarray) -> None:
        rows = self.model.config.vocab_size
        beyond = (ids < 0) | (ids >= rows)
        if (beyond & mask.astype(bool)).any():
            row, column = np.argwhere(beyond & mask.astype(bool))[0]
            raise InputError(
                f"the token {ids[row, column]} of prompt {row + 1} has no row in the "
                f"embedding, which has {rows}: use the model's own tokenizer."
            )
        if strange := [t for t in self.stop if not 0 <= t < rows]:
            raise InputError(
                f"the stop token {strange[0]} has no row in the embedding, which has "
                f"{rows}."
            )
        context = self.model.config.max_position_embeddings
        longest = int(mask.astype(bool).sum(1).max(initial=0))
        if longest + self.config.max_new_tokens > context:
            raise InputError(
                f"a prompt of {longest} tokens and {self.config.max_new_tokens} new "
                "ones are more than the model's context (max_position_embeddings "
                f"{context}): shorten the prompt or lower max_new_tokens."
            )


def _groups() -> int:
    return group_count(jax.sharding.get_mesh().shape)


def _as_rows(input_ids: Any, attention_mask: Any) -> tuple[np.ndarray, np.ndarray]:
    try:
        ids = np.asarray(input_ids)
    except ValueError:  # rows of several lengths
        ids = np.zeros(0, object)
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer) or not ids.size:
        raise InputError(
            "input_ids must be integers of shape (b, t), not empty; got "
            f"{ids.dtype} of shape {ids.shape}. Pad rows of different lengths and give "
            "their attention_mask, or use generate_batches."
        )
    mask = np.ones(ids.shape, np.int32) if attention_mask is None else attention_mask
    mask = np.asarray(mask)
    if mask.shape != ids.shape:
        raise InputError(
            f"attention_mask must have the shape of input_ids, {ids.shape}; got "
            f"{mask.shape}."
        )
    if len(empty := np.flatnonzero(~mask.astype(bool).any(1))):
        raise InputError(
            f"row {empty[0] + 1} has no token: begin it with the beginning-of-sequence "
            "token, or leave it out."
        )
    return ids, mask
