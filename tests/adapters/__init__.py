"""A tiny LLaMA, its adapters with factors that are not zero, and W + s B A in NumPy."""

import functools
import math
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from manifold_lora.adapters import factors, set_factors
from manifold_lora.checkpoints.huggingface import load_llama
from manifold_lora.models import Llama
from tests.models import reference

CONFIG = reference.CONFIGS["llama-3"]  # three layers, k and v half as wide as q
TENSORS = reference.random_tensors(CONFIG)
LAYERS: int = CONFIG["num_hidden_layers"]
IDS = np.random.default_rng(1).integers(0, 61, (2, 12))
# (inputs, outputs) of every projection
SIZES = {
    "self_attn.q_proj": (32, 32),
    "self_attn.k_proj": (32, 16),
    "self_attn.v_proj": (32, 16),
    "self_attn.o_proj": (32, 32),
    "mlp.gate_proj": (32, 48),
    "mlp.up_proj": (32, 48),
    "mlp.down_proj": (48, 32),
}
Matrices = dict[str, tuple[np.ndarray, np.ndarray]]  # full name: A (r, in), B (out, r)


@functools.cache
def _loaded(dtype: type) -> Llama:
    with tempfile.TemporaryDirectory() as directory:
        path = reference.write_checkpoint(Path(directory) / "base", CONFIG, TENSORS)
        return load_llama(path, dtype)


def base(dtype: type = jnp.float32) -> Llama:
    """A model of its own with the weights TENSORS."""
    return nnx.clone(_loaded(dtype))


@functools.partial(jax.jit, static_argnums=0)
def _run(graph: Any, state: Any, tokens: Any, key: Any) -> jax.Array:
    return nnx.merge(graph, state)(tokens, key=key)


def logits(model: Llama, tokens: Any = IDS, key: jax.Array | None = None) -> np.ndarray:
    """The jitted forward pass; equal structures compile once."""
    return np.asarray(_run(*nnx.split(model), jnp.asarray(tokens), key))


def randomize(model: Llama, seed: int = 0) -> Llama:
    """Other factors, so that ΔW is of the size of W: B stays where it is if it is
    orthonormal, all else is normal."""
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: jax.Array) -> jax.Array:
        if path[-1].key == "b" and leaf.any():
            return leaf
        size = leaf.shape[1] if path[-1].key == "a" else 4 * leaf.shape[2]
        return jnp.asarray(rng.normal(size=leaf.shape) / math.sqrt(size), jnp.float32)

    set_factors(model, jax.tree_util.tree_map_with_path(draw, factors(model)))
    return model


def matrices(model: Llama) -> Matrices:
    """A (r, in) and B (out, r) of every adapted module, by its full name."""
    found = {}
    for part, modules in factors(model)["layers"].items():
        for name, pair in modules.items():
            a, b = np.asarray(pair["a"]), np.asarray(pair["b"])
            for n in range(LAYERS):
                found[f"model.layers.{n}.{part}.{name}"] = (a[n].T, b[n])
    return found


def updated(
    pairs: Matrices, scale: float | Mapping[str, float] | Callable[[str], float]
) -> reference.Tensors:
    """TENSORS with W + s B A in float64; the scale may depend on the full name."""
    tensors = {name: np.asarray(x, np.float64) for name, x in TENSORS.items()}
    for full, (a, b) in pairs.items():
        if callable(scale):
            s = scale(full)
        else:
            s = scale[full] if isinstance(scale, Mapping) else scale
        tensors[f"{full}.weight"] += s * b.astype(np.float64) @ a.astype(np.float64)
    return tensors


def needed_logits(tensors: reference.Tensors) -> np.ndarray:
    return np.stack([reference.logits(tensors, CONFIG, row) for row in IDS])


def error(got: Any, needed: Any) -> float:
    return float(np.max(np.abs(np.asarray(got, np.float64) - np.asarray(needed))))
