"""What is evaluated: a base, by itself and with each of some adapters."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from manifold_lora.adapters import axes, split
from manifold_lora.checkpoints.adapter_file import (
    CONFIG,
    EXTRA,
    FACTORS,
    WEIGHTS,
    adapter_directory,
)
from manifold_lora.checkpoints.companions import stop_tokens
from manifold_lora.generation.batched import generate_batches
from manifold_lora.generation.config import GenerationConfig
from manifold_lora.models import Llama


def adapter_digest(path: Path) -> str:
    """A hash of the files of an adapter, or of the adapter of a run."""
    path, digest = adapter_directory(path), hashlib.sha256()
    for name in (CONFIG, WEIGHTS, EXTRA, FACTORS):
        if (path / name).is_file():
            digest.update(name.encode() + (path / name).read_bytes())
    return digest.hexdigest()[:16]


class System:
    """A model with what it takes to run it compiled: factors, frozen rest, axes.

    Args:
        model: with or without an adapter.
        tokenizer: its tokenizer.
        source: its directory, which names the tokens that end an answer.
    """

    def __init__(self, model: Llama, tokenizer: Any, source: Path):
        self.model, self.tokenizer = model, tokenizer
        self.rebuild, self.factors, self.frozen = split(model)
        self.axes = axes(model)
        self.stop = stop_tokens(source, tokenizer)

    def generate(
        self, prompts: Sequence[Sequence[int]], batch_size: int, **options: Any
    ) -> list[list[int]]:
        """New tokens for each prompt, without the token that ends it.

        Args:
            prompts: their tokens.
            batch_size: prompts of a batch; fewer are padded.
            options: fields of `GenerationConfig`.
        """
        made = generate_batches(
            self.model,
            prompts,
            GenerationConfig(**options),
            stop_tokens=self.stop,
            batch_size=batch_size,
        )
        by_index = dict(made)
        return [by_index[index] for index in range(len(prompts))]
