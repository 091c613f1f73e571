"""Adapters as they are exported, where that is not what was trained."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax.numpy as jnp
import numpy as np

from manifold_lora.adapters.attach import (
    adapters,
    factors,
    full_names,
    projections,
    set_factors,
)
from manifold_lora.adapters.factor import tags
from manifold_lora.adapters.low_rank import LowRankLinear
from manifold_lora.adapters.scaled import ScaledLinear
from manifold_lora.distributed.arrays import shard_module
from manifold_lora.manifolds import Oblique, Stiefel, truncate


@contextmanager
def as_exported(
    model: Any,
    *,
    project_on_export: bool = False,
    truncate_below: float | None = None,
) -> Iterator[float]:
    """Hold the adapters as they are to be exported, within the block.

    Afterwards the model holds the trained ones again. Save the adapter inside the
    block, and evaluate the model there to measure what was saved.

    Args:
        model: a `Llama` with adapters.
        project_on_export: project factors that were only attracted to their manifold
            to the nearest point on it.
        truncate_below: drop the singular values of A Vᵀ below this, of points of
            `BoundedRank`; every layer keeps the rank that it needs, at least 1.

    Yields:
        The share of the energy Σσ² of all A Vᵀ, without their scales, that truncation
        discards.
    """
    own = adapters(model)
    originals = []
    for name, parent, attribute in list(projections(model)):
        module = getattr(parent, attribute)
        if isinstance(module, ScaledLinear):
            originals.append((module, "adapter", module.adapter))
        elif name in own:
            originals.append((parent, attribute, module))
    share = 0.0
    trained = factors(model)
    try:
        if project_on_export:
            for module in own.values():
                _project(module)
        if truncate_below is not None:
            new, share = _truncated(model, own, truncate_below)
            for (parent, attribute, _), module in zip(originals, new, strict=True):
                setattr(parent, attribute, module)
        yield share
    finally:
        for parent, attribute, module in originals:
            setattr(parent, attribute, module)
        set_factors(model, trained)


def _project(module: LowRankLinear) -> None:
    for name, manifold in tags(module.factors(module.config)).items():
        if isinstance(manifold, Stiefel | Oblique):
            variable = getattr(module, name)
            variable.set_value(manifold.nearest_point(variable[...]))


def _truncated(
    model: Any, own: dict[str, LowRankLinear], threshold: float
) -> tuple[list[LowRankLinear], float]:
    lost = total = 0.0
    arrays: dict[str, list[dict[str, np.ndarray]]] = {}
    ranks, alphas = {}, {}
    for name, module in own.items():
        arrays[name] = []
        stored = module.arrays()
        for layer, full in enumerate(full_names(model, name)):
            point = {k: jnp.asarray(x) for k, x in stored[layer].items()}
            total += float(jnp.sum(point["a"] ** 2))
            if module.ranks[layer]:
                point, energy = truncate(point, threshold)
                lost += float(energy)
                ranks[full] = rank = point["a"].shape[1]
                # The same s = alpha/r or alpha/√r with fewer columns.
                share = rank / module.ranks[layer]
                root = module.config.rslora
                alphas[full] = module.alphas[layer] * (share**0.5 if root else share)
            arrays[name].append({k: np.asarray(x) for k, x in point.items()})
    first = next(iter(own.values()))
    config = dataclasses.replace(first.config, rank_pattern=ranks, alpha_pattern=alphas)
    new = []
    for name, module in own.items():
        full = full_names(model, name)
        shrunk = type(module)(
            module.base,
            config,
            ranks=[ranks.get(n, 0) for n in full],
            alphas=[alphas.get(n, 1.0) for n in full],
            arrays={k: [x[k] for x in arrays[name]] for k in module.names},
        )
        shard_module(shrunk)
        new.append(shrunk)
    return new, lost / total if total else 0.0
