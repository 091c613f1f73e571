"""Low-rank updates as any loader computes them, and how far two of them are apart."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from manifold_lora.adapters.config import AdapterConfig
from manifold_lora.adapters.diagnostics import compressed_product
from manifold_lora.adapters.options import adapter_class
from manifold_lora.checkpoints.adapter_file import AdapterFile, ModuleFactors
from manifold_lora.models import Llama

MAGNITUDE = "lora_magnitude_vector"  # PEFT's name for the lengths of DoRA


class Update(NamedTuple):
    """What a loader adds to one weight: ΔW = scale · B A; with lengths, as DoRA."""

    a: np.ndarray  # (r, in)
    b: np.ndarray  # (out, r)
    scale: float
    magnitude: np.ndarray | None = None  # (out,)


def updates(adapter: AdapterFile) -> dict[str, Update]:
    """The updates of an adapter by full name, as it was trained."""
    declared = adapter_class(adapter.method).factors(adapter.config)
    name = next((n for n, f in declared.items() if f.peft == MAGNITUDE), None)
    result = {}
    for full, module in adapter.modules.items():
        own = module.factors
        # Those of a folded file have been rounded; the factors have not.
        a, b = (
            (own["a"], own["b"]) if own.keys() == {"a", "b"} else (module.a, module.b)
        )
        result[full] = Update(a.T, b, module.scale, own[name] if name else None)
    return result


Updates = Mapping[str, Update]  # by full name


def relative_difference(one: Updates, other: Updates) -> float:
    """The largest ‖ΔW − ΔW'‖ / ‖ΔW‖ of all modules, in Frobenius norms.

    Also of the lengths of DoRA. Infinite where one of them lacks a module.
    """
    if one.keys() != other.keys():
        return float("inf")
    return max(_difference(one[full], other[full]) for full in one)


def _difference(x: Update, y: Update) -> float:
    if (x.a.shape[1], x.b.shape[0]) != (y.a.shape[1], y.b.shape[0]):
        return float("inf")
    b = [np.float64(u.scale) * u.b.astype(np.float64) for u in (x, y)]
    both_a = np.hstack([u.a.T.astype(np.float64) for u in (x, y)])
    both_b = np.hstack([b[0], -b[1]])
    difference = np.linalg.norm(compressed_product(both_b, both_a))
    size = np.linalg.norm(compressed_product(b[0], x.a.T))
    ratios = [_ratio(float(difference), float(size))]
    if x.magnitude is not None and y.magnitude is not None:
        apart = np.linalg.norm(x.magnitude.astype(np.float64) - y.magnitude)
        ratios.append(_ratio(float(apart), float(np.linalg.norm(x.magnitude))))
    elif x.magnitude is not y.magnitude:
        ratios.append(float("inf"))
    return max(ratios)


def _ratio(difference: float, size: float) -> float:
    return difference / size if size else (float("inf") if difference else 0.0)


def as_adapter(updates: Updates) -> AdapterFile:
    """The same updates as an adapter of the method "lora" or "dora"."""
    rank = max(u.a.shape[0] for u in updates.values())
    first = next(iter(updates.values()))
    method = "lora" if first.magnitude is None else "dora"
    modules = {}
    for full, u in updates.items():
        a = np.ascontiguousarray(u.a.T, np.float32)
        factors = {"a": a, "b": np.asarray(u.b, np.float32)}
        if u.magnitude is not None:
            factors["m"] = np.asarray(u.magnitude, np.float32)
        own = u.a.shape[0]
        modules[full] = ModuleFactors(
            a, factors["b"], u.scale, factors, {}, own, u.scale * own
        )
    config = AdapterConfig(method, rank=rank, alpha=rank, targets=list(updates))
    return AdapterFile(method, config, modules, None)


def probe_logits(model: Llama) -> np.ndarray:
    """The logits of a model on a fixed batch of random tokens."""
    shape, vocab = (2, 32), model.config.vocab_size
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, vocab, shape))
    graph, state = nnx.split(model)
    return np.asarray(jax.jit(lambda state: nnx.merge(graph, state)(tokens))(state))
