"""Generate for many prompts, batch by batch."""

from collections.abc import Iterator, Sequence

import numpy as np

from manifold_lora.errors import InputError
from manifold_lora.generation.config import GenerationConfig
from manifold_lora.generation.generate import Generator
from manifold_lora.generation.padding import pad_prompts, until_stop
from manifold_lora.models import Llama


def generate_batches(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    *,
    stop_tokens: Sequence[int] | None = None,
    batch_size: int = 8,
) -> Iterator[tuple[int, list[int]]]:
    """Continue many prompts, those of similar length together.

    What a prompt becomes does not depend on the others or on the batch size, beyond
    the rounding of float arithmetic.

    Args:
        model: with or without adapters.
        prompts: token ids of each.
        config: how tokens are chosen.
        stop_tokens: None, the model's own.
        batch_size: prompts of a batch at most.

    Raises:
        InputError: an empty prompt, or as `generate`.

    Yields:
        The index of a prompt and its new ids, without the stop token: batch by batch,
        the longest prompts first, so that memory runs out at once or never.
    """
    if empty := [i for i, prompt in enumerate(prompts) if not len(prompt)]:
        raise InputError(
            f"prompt {empty[0] + 1} has no token: begin it with the "
            "beginning-of-sequence token, or leave it out."
        )
    generator = Generator(model, config, stop_tokens)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    for first in range(0, len(order), batch_size):
        indices = order[first : first + batch_size]
        ids, mask = pad_prompts([prompts[i] for i in indices], batch_size)
        padded = np.resize(indices, batch_size)
        new_ids = generator(ids, mask, indices=padded)
        for i, row in zip(indices, new_ids, strict=False):
            yield i, until_stop(row.tolist(), generator.stop)
