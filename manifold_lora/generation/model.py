"""A base with an adapter, loaded to be used, not trained."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp

from manifold_lora.adapters.attach import projections
from manifold_lora.checkpoints.adapter_file import adapter_directory
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
    model = load_llama(config.path or BASE, jnp.dtype(dtype), config.base_dtype)
    shard_module(model)
    return model


@contextlib.contextmanager
def adapted(model: Llama, adapter: Path | None) -> Iterator[None]:
    """The model with an adapter inside of the block, and without it after.

    Args:
        model: a base.
        adapter: the directory of an adapter or of a run, whose adapter/ it is; None
            leaves the base as it is.
    """
    if adapter is None:
        yield
        return
    sites = [
        (parent, attribute, getattr(parent, attribute))
        for _, parent, attribute in projections(model)
    ]
    load_adapter(model, adapter_directory(adapter))
    shard_module(model)
    try:
        yield
    finally:
        for parent, attribute, linear in sites:
            setattr(parent, attribute, linear)
