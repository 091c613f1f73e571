"""Whether all files of an adapter directory are of one adapter, unchanged."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from manifold_lora.adapters.config import AdapterConfig, check_targets, is_target
from manifold_lora.adapters.factor import Factor
from manifold_lora.adapters.options import adapter_class
from manifold_lora.checkpoints.adapter_writer import CONFIG, EXTRA, FACTORS, WEIGHTS
from manifold_lora.errors import InputError

if TYPE_CHECKING:
    from manifold_lora.checkpoints.adapter_file import ModuleFactors

Tensors = Mapping[str, np.ndarray]


def check_same(
    path: Path,
    settings: AdapterConfig,
    declared: Mapping[str, Factor],
    modules: Mapping[str, "ModuleFactors"],
    by_module: Mapping[str, Tensors],
    scales: Mapping[str, float],
    folded: bool,
) -> None:
    """All files must agree: another tool may have changed those that it knows."""
    try:
        check_targets(settings.targets, list(modules))
    except InputError as error:
        raise InputError(f"{path / EXTRA}: {error}") from error
    if others := [full for full in modules if not is_target(settings.targets, full)]:
        raise InputError(f"{path / EXTRA}: targets do not name {others[0]}.")
    for full, module in modules.items():
        own = settings.scale(module.rank, module.alpha)
        if not math.isclose(1.0 if folded else own, scales[full], rel_tol=1e-6):
            by = f"by {own:g}, which B contains already" if folded else f"by {own:g}"
            need = "lora_alpha = r" if folded else "the same rank and alpha in both"
            raise InputError(
                f"{path / CONFIG} scales {full} by {scales[full]:g}, and {EXTRA} {by}: "
                f"set {need}, or remove {EXTRA} and {FACTORS} to read the directory as "
                "plain LoRA."
            )
        remedy = (
            "copy the directory again, or remove this file and manifold_lora.json to "
            "read it as plain LoRA."
        )
        if missing := declared.keys() - module.factors.keys():
            raise InputError(f"{path / FACTORS} has no {full}.{min(missing)}: {remedy}")
        if unknown := module.factors.keys() - declared.keys():
            raise InputError(
                f"{path / FACTORS} has {full}.{min(unknown)}, which is not an array of "
                f"{settings.method}: {remedy}"
            )
        if not _agree(settings, declared, module, by_module[full]):
            raise InputError(
                f"{path / FACTORS} and {WEIGHTS} are of different adapters ({full} "
                f"differs): {remedy}"
            )


def _agree(
    settings: AdapterConfig,
    declared: Mapping[str, Factor],
    module: "ModuleFactors",
    tensors: Tensors,
) -> bool:
    """Whether the factors are what was exported as the tensors of PEFT's file."""
    sizes = {
        "in": module.a.shape[0],
        "out": module.b.shape[0],
        "rank": module.rank,
    }
    for name, factor in declared.items():
        x = module.factors[name]
        if x.shape != factor.shape(sizes):
            return False
        if factor.peft is not None and not (
            factor.peft in tensors
            and np.array_equal(x, tensors[factor.peft], equal_nan=True)
        ):
            return False
    product = adapter_class(settings.method).product
    pair = map(np.asarray, product(jax.tree.map(jnp.asarray, module.factors)))
    if _padding(tensors, module.a.shape[1]).any():
        return False
    return all(
        x.shape == y.shape and np.allclose(x, y, 0, _rounding(x), equal_nan=True)
        for x, y in zip(pair, (module.a, module.b), strict=True)
    )


def _padding(tensors: Tensors, width: int) -> np.ndarray:
    """What lies beyond the columns of a module in PEFT's tensors."""
    if "lora_A.weight" not in tensors:
        return np.zeros(0)
    a, b = tensors["lora_A.weight"][width:], tensors["lora_B.weight"][:, width:]
    return np.concatenate([a.ravel(), b.ravel()])


def _rounding(x: np.ndarray) -> float:
    """The tolerance for a product that may have been summed in another order."""
    return 1e-5 * float(np.abs(x[np.isfinite(x)]).max(initial=0))
