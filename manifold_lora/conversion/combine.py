"""Weighted sums of adapters, exact by concatenation, and their truncation."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from manifold_lora.checkpoints.adapter_file import AdapterFile
from manifold_lora.conversion.updates import Update, Updates, updates
from manifold_lora.errors import InputError


class Weighted(NamedTuple):
    """An adapter with its weight in a sum."""

    path: Path
    adapter: AdapterFile
    weight: float


class Factorised(NamedTuple):
    """A product B Aᵀ = U diag(σ) Vᵀ in float64, largest σ first."""

    u: np.ndarray  # (out, k), orthonormal columns
    sigma: np.ndarray  # (k,)
    v: np.ndarray  # (in, k), orthonormal columns


def combined(sources: Sequence[Weighted]) -> dict[str, Update]:
    """The sum Σ wᵢ ΔWᵢ of adapters of any ranks and methods, by full name.

    Exact: the factors are concatenated, and weights and scales multiplied into B, as
    PEFT's `add_weighted_adapter(combination_type="cat")` does. An adapter alone with
    weight 1 stays as it is.

    Raises:
        InputError: DoRA in a sum or with a weight: its lengths cannot be added.
    """
    (first, *others) = sources
    if not others and first.weight == 1:
        return updates(first.adapter)
    if dora := [s for s in sources if s.adapter.config.options.export == "DoRA"]:
        raise InputError(
            f"{', '.join(str(s.path) for s in dora)} of the method "
            f"{dora[0].adapter.method} cannot be weighted or added: DoRA normalises "
            "W + ΔW by lengths of its own. Merge it alone with weight 1, and merge the "
            "other adapters into the result if they were trained on that; or use "
            "adapters of a method without DoRA."
        )
    parts: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for source in sources:
        for full, update in updates(source.adapter).items():
            scale = np.float64(source.weight) * update.scale
            b = (scale * update.b.astype(np.float64)).astype(np.float32)
            parts.setdefault(full, []).append((update.a, b))
    sums = {}
    for full, pairs in parts.items():
        a = np.concatenate([a for a, _ in pairs])
        b = np.concatenate([b for _, b in pairs], axis=1)
        sums[full] = _float32(fitting(Update(a, b, 1.0)))
    return sums


def fitting(update: Update) -> Update:
    """The same ΔW with at most as many columns as the layer allows."""
    if len(update.a) <= min(update.a.shape[1], len(update.b)):
        return update
    u, sigma, v = factorised(update._replace(scale=1.0))
    return update._replace(a=v.T, b=u * sigma)


def _float32(update: Update) -> Update:
    return update._replace(a=np.float32(update.a), b=np.float32(update.b))


def check_same_base(sources: Sequence[Weighted]) -> None:
    """Raise `InputError` for adapters that cannot be of one base."""
    sizes: dict[str, tuple[tuple[int, int], Path]] = {}
    errors = []
    for source in sources:
        for full, module in source.adapter.modules.items():
            size = (len(module.b), len(module.a))
            needed, path = sizes.setdefault(full, (size, source.path))
            if size != needed:
                errors.append(
                    f"{full}: {source.path} has {size} outputs and inputs, {path} has "
                    f"{needed}"
                )
    bases = {s.adapter.base: s.path for s in sources if s.adapter.base is not None}
    if len({base.count(":") for base in bases}) < len(bases):  # two of one version
        errors += [f"{path}: fingerprint {base}" for base, path in bases.items()]
    stored = {
        s.adapter.base_dtype or "its own type": s.path
        for s in sources
        if s.adapter.base is not None
    }
    if len(stored) > 1:
        errors += [f"{path}: trained on the base in {x}" for x, path in stored.items()]
    if errors:
        raise InputError(
            "The adapters are of different bases:\n  "
            + "\n  ".join(errors)
            + "\nCombine adapters of one base."
        )


def truncated(sums: Updates, rank: int) -> tuple[dict[str, Update], float]:
    """The best approximation of rank `rank` of every update.

    Args:
        sums: without the lengths of DoRA.
        rank: the most of a module.

    Returns:
        The updates, and the share Σσ² of all singular values that is discarded.

    Raises:
        InputError: an update is DoRA's.
    """
    if any(update.magnitude is not None for update in sums.values()):
        raise InputError(
            "--rank cannot truncate DoRA, whose lengths belong to the whole of W + ΔW: "
            "leave --rank out."
        )
    result, lost, total = {}, 0.0, 0.0
    for full, update in sums.items():
        u, sigma, v = factorised(update)
        total += float(np.sum(sigma**2))
        lost += float(np.sum(sigma[rank:] ** 2))
        root = np.sqrt(sigma[:rank])
        a, b = (v[:, :rank] * root).T, u[:, :rank] * root
        result[full] = _float32(Update(a, b, 1.0))
    return result, lost / total if total else 0.0


def factorised(update: Update) -> Factorised:
    """The singular values and vectors of ΔW, which is never formed.

    By QR of both factors and the SVD of the small core, in float64 and outside of any
    compiled program: on small CPUs LAPACK may hang in one.
    """
    q_a, r_a = np.linalg.qr(update.a.T.astype(np.float64))
    q_b, r_b = np.linalg.qr(update.b.astype(np.float64))
    p, sigma, wt = np.linalg.svd(update.scale * r_b @ r_a.T)
    k = len(sigma)
    return Factorised(q_b @ p[:, :k], sigma, q_a @ wt[:k].T)


def ranks(sums: Mapping[str, Update]) -> list[int]:
    """The ranks that occur, in order."""
    return sorted({update.a.shape[0] for update in sums.values()})
