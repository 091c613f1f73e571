"""The logits of model directories on a few random tokens, one layer in memory."""

import gc
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from manifold_lora.checkpoints.adapter_file import AdapterFile
from manifold_lora.checkpoints.huggingface import load_layer
from manifold_lora.checkpoints.peft import install_adapter
from manifold_lora.conversion.shards import BLOCK, Stored
from manifold_lora.models import LlamaConfig
from manifold_lora.models.layers import rope_angles, rope_frequencies

_TOKENS = (2, 32)


class Model(NamedTuple):
    """A model in files, with an adapter or without one."""

    config: LlamaConfig
    tensors: Mapping[str, Stored]
    adapter: AdapterFile | None = None


class Difference(NamedTuple):
    """How far the logits of two models are apart."""

    largest: float
    logits: float  # the largest of all, for comparison


def compare_logits(one: Model, other: Model) -> Difference:
    """The largest difference of the logits of two models of one vocabulary.

    In float32, on a fixed batch of random tokens. The layers are loaded one at a time,
    and the head in blocks, so that neither model is ever in memory.
    """
    ids = np.random.default_rng(0).integers(0, one.config.vocab_size, _TOKENS)
    hidden = [_hidden_states(model, ids) for model in (one, other)]
    heads = [_head(model) for model in (one, other)]
    difference = size = 0.0
    rows = max(1, BLOCK // one.config.hidden_size)
    for first in range(0, one.config.vocab_size, rows):
        block = first, min(first + rows, one.config.vocab_size)
        x, y = (
            h @ head.read(block).astype(np.float32).T
            for h, head in zip(hidden, heads, strict=True)
        )
        difference = max(difference, float(np.abs(x - y).max()))
        size = max(size, float(np.abs(x).max()))
    return Difference(difference, size)


def _head(model: Model) -> Stored:
    tied = model.config.tie_word_embeddings
    return model.tensors["model.embed_tokens.weight" if tied else "lm_head.weight"]


def _hidden_states(model: Model, ids: np.ndarray) -> np.ndarray:
    """What the head is applied to, (tokens, d)."""

    def read(name: str) -> np.ndarray:
        return model.tensors[name].read()

    embedding = model.tensors["model.embed_tokens.weight"]
    rows = [embedding.read((i, i + 1)) for i in ids.ravel().tolist()]
    x = jnp.asarray(np.concatenate(rows).astype(np.float32)).reshape(*ids.shape, -1)
    for layer in range(model.config.num_hidden_layers):
        x = _layer_output(model, layer, read, x)
        gc.collect()  # Flax' modules refer to themselves, and would pile up
    norm = load_layer(model.config, 0, read).norm
    return np.asarray(norm(x)).reshape(ids.size, -1)


def _layer_output(
    model: Model, layer: int, read: Callable[[str], np.ndarray], x: jax.Array
) -> jax.Array:
    """One layer applied, (b, t, d)."""
    one = load_layer(model.config, layer, read)
    if model.adapter is not None:
        own = _of_layer(model.adapter, layer)
        if own.modules:
            install_adapter(one, own)
    graph, state = nnx.split(one.layers)
    return jax.block_until_ready(_run((one.config, graph), state, x))


def _of_layer(adapter: AdapterFile, layer: int) -> AdapterFile:
    """The adapter of one layer, as of the first."""
    prefix = f"model.layers.{layer}."
    modules = {
        "model.layers.0." + full.removeprefix(prefix): module
        for full, module in adapter.modules.items()
        if full.startswith(prefix)
    }
    return adapter._replace(modules=modules)


@partial(jax.jit, static_argnums=0)
def _run(static: Any, state: Any, x: jax.Array) -> jax.Array:
    """One layer, of which `state` has a stack of one; compiled once for all."""
    config, graph = static
    time = jnp.arange(x.shape[1])
    rope = rope_angles(rope_frequencies(config), time[None])
    mask = (time[:, None] >= time)[None, None]
    block = nnx.merge(graph, jax.tree.map(lambda leaf: leaf[0], state))
    with jax.default_matmul_precision("highest"):
        return block(x, rope, mask)[0]
