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

from manifold_lora.adapters import adapters
from manifold_lora.adapters.factor import tags
from manifold_lora.adapters.scaled import ScaledLinear
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
    """Other factors, so that ΔW is of the size of W: orthonormal ones stay where they
    are, and so does what fills up a layer of a lower rank."""
    rng = np.random.default_rng(seed)
    for name, module in adapters(model).items():
        for factor in tags(module.factors(module.config)):
            variable = getattr(module, factor)
            x = np.array(variable[...])
            orthonormal = factor in "uv" or (factor == "b" and x.any())
            for layer, rank in enumerate(module.ranks):
                if rank and not orthonormal:
                    part = own(x[layer], factor, name, rank, module.config.method)
                    part[...] = drawn(rng, factor, part)
            variable.set_value(jnp.asarray(x))
    for path, module in nnx.iter_modules(model.layers):
        if isinstance(module, ScaledLinear):
            del path
            for diagonal in (module.d1, module.d2):
                ones = rng.uniform(0.5, 1.5, diagonal.shape)
                diagonal.set_value(jnp.asarray(ones, jnp.float32))
    return model


def drawn(rng: np.random.Generator, factor: str, part: np.ndarray) -> np.ndarray:
    """Random numbers of the shape of one layer's factor."""
    if factor == "m":
        return part * rng.uniform(0.5, 1.5, part.shape)
    size = part.shape[0] if factor == "a" else 4 * max(part.shape[-1], 1)
    return rng.normal(size=part.shape) / math.sqrt(size if factor != "s" else 1)


def own(x: np.ndarray, factor: str, name: str, rank: int, method: str) -> np.ndarray:
    """One layer's factor, without the rows and columns that only fill it up."""
    inputs, outputs = SIZES[name]
    rows = inputs if factor in ("a", "a0", "v") else outputs
    if factor == "a" and method == "loram_br":
        rows = outputs
    if factor == "s":
        return x[:rank, :rank] if x.ndim == 2 else x[:rank]
    return x[:rows] if factor == "m" else x[:rows, :rank]


def arrays(model: Llama) -> dict[str, dict[str, np.ndarray]]:
    """The factors of every adapted layer by its full name and theirs, in float64."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, module in adapters(model).items():
        for layer, rank in enumerate(module.ranks):
            if rank:
                found[f"model.layers.{layer}.{name}"] = {
                    factor: own(
                        np.asarray(getattr(module, factor)[...], np.float64)[layer],
                        factor,
                        name,
                        rank,
                        module.config.method,
                    )
                    for factor in module.names
                }
    return found


def matrices(model: Llama) -> Matrices:
    """A (r, in) and B (out, r) of every adapted layer, by its full name."""
    return {
        full: (x["a"].T.astype(np.float32), x["b"].astype(np.float32))
        for full, x in arrays(model).items()
    }


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
