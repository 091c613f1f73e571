"""What is evaluated: a base, by itself and with each of some adapters."""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from manifold_lora.adapters import axes, split
from manifold_lora.adapters.attach import projections
from manifold_lora.checkpoints.adapter_file import CONFIG, EXTRA, FACTORS, WEIGHTS
from manifold_lora.checkpoints.companions import stop_tokens
from manifold_lora.checkpoints.huggingface import load_llama
from manifold_lora.checkpoints.peft import load_adapter
from manifold_lora.configuration.parts import BaseConfig
from manifold_lora.data.builtin import BASE
from manifold_lora.distributed.arrays import shard_module
from manifold_lora.models import Llama


def load_base(config: BaseConfig) -> Llama:
    """The base, sharded on the mesh of `jax.set_mesh`."""
    on_cpu = jax.default_backend() == "cpu"
    dtype = config.dtype or ("float32" if on_cpu else "bfloat16")
    model = load_llama(config.path or BASE, jnp.dtype(dtype))
    model.remat = False  # there is no backward pass
    shard_module(model)
    return model


@contextlib.contextmanager
def adapted(model: Llama, adapter: Path | None) -> Iterator[None]:
    """The model with an adapter inside of the block, and without it after."""
    if adapter is None:
        yield
        return
    sites = [
        (parent, attribute, getattr(parent, attribute))
        for _, parent, attribute in projections(model)
    ]
    load_adapter(model, adapter)
    shard_module(model)
    try:
        yield
    finally:
        for parent, attribute, linear in sites:
            setattr(parent, attribute, linear)


def adapter_digest(path: Path) -> str:
    """A hash of the files of an adapter."""
    digest = hashlib.sha256()
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
        from manifold_lora.generation.batched import generate_batches
        from manifold_lora.generation.config import GenerationConfig

        made = generate_batches(
            self.model,
            prompts,
            GenerationConfig(**options),
            stop_tokens=self.stop,
            batch_size=batch_size,
        )
        by_index = dict(made)
        return [by_index[index] for index in range(len(prompts))]
