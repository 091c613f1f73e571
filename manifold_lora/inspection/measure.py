"""The measures of an adapter: per module, per kind of module, and overall."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from manifold_lora.adapters.diagnostics import (
    RANK_THRESHOLD,
    column_cosines,
    compressed_product,
    effective_rank,
    gram,
    largest_entries,
    numerical_rank,
    principal_angles,
    singular_values,
    stable_rank,
)
from manifold_lora.adapters.factor import Factor
from manifold_lora.adapters.options import adapter_class
from manifold_lora.errors import InputError
from manifold_lora.manifolds import Euclidean, Manifold

if TYPE_CHECKING:
    from manifold_lora.checkpoints.adapter_file import AdapterFile, ModuleFactors

# Aggregated over layers by the maximum; all other measures by the mean.
_MAXIMA = ("residual", "cosine_max", "angle_largest")
# In the order of the computation; files are sorted by name.
_PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")


def measure(
    adapter: "AdapterFile", start: "AdapterFile | None" = None
) -> dict[str, Any]:
    """Measure an adapter per module, per kind of module, and overall.

    For ΔW and each matrix of `factor_matrices`: `rank_used` (`numerical_rank`),
    `effective_rank`, `stable_rank` and `singular_values`. For ΔW, also its Frobenius
    norm and its largest entries. For a factor, also `residual`, its constraint
    violation; `cosine_mean`, `cosine_std`, `cosine_max` (`column_cosines`); and
    `angle_mean`, `angle_largest`, the principal angles between its column space and
    the initial one, in degrees. None where a measure is undefined: the constraint
    violation of a free factor, cosines of a single column, and angles without an
    initialisation, from zero, or of a square factor. For DoRA, ΔW is the update of the
    direction.

    A kind is a module's name without its layer. Over layers, measures are averaged,
    except residual, cosine_max and angle_largest, of which the maximum is reported.

    Args:
        adapter: as read from its file.
        start: the same adapter before the first step.

    Raises:
        InputError: NaN or infinite values, or `start` is of another adapter.
    """
    _check_finite(adapter)
    declared = _declared(adapter)
    modules: dict[str, Any] = {}
    for name in sorted(adapter.modules, key=_order):
        factors = adapter.modules[name]
        layer, kind = _layer_and_kind(name)
        matrices = factor_matrices(factors, declared)
        initial = {} if start is None else _initial_matrices(name, matrices, start)
        modules[name] = {
            "layer": layer,
            "kind": kind,
            "rank": factors.rank,
            "scale": float(factors.scale),
            "delta_w": _update_measures(factors),
            "factors": {
                key: _factor_measures(x, factors.manifolds.get(key), initial.get(key))
                for key, x in matrices.items()
            },
        }
    kinds = dict.fromkeys(module["kind"] for module in modules.values())
    return {
        "method": adapter.method,
        "used_threshold": RANK_THRESHOLD,
        "summary": _average(modules),
        "kinds": {
            kind: _average({n: m for n, m in modules.items() if m["kind"] == kind})
            for kind in kinds
        },
        "modules": modules,
    }


def _check_finite(adapter: "AdapterFile") -> None:
    errors = []
    for name, module in adapter.modules.items():
        arrays = module.factors | {"ΔW": np.hstack([module.b.ravel(), module.scale])}
        non_finite = [key for key, x in arrays.items() if not np.isfinite(x).all()]
        if non_finite:
            errors.append(f"{name}: {', '.join(non_finite)}")
    if errors:
        raise InputError(
            f"{len(errors)} of {len(adapter.modules)} modules contain NaN or infinite "
            "values:\n  "
            + "\n  ".join(errors[:8] + ["…"] * (len(errors) > 8))
            + "\nTraining diverged: use an earlier adapter, or retrain with a lower "
            "--learning-rate."
        )


def _initial_matrices(
    name: str, matrices: Mapping[str, np.ndarray], start: "AdapterFile"
) -> dict[str, np.ndarray]:
    """The matrices of the module at initialisation, checked to fit the trained ones."""
    initial: dict[str, np.ndarray] = {}
    if name in start.modules:
        initial = factor_matrices(start.modules[name], _declared(start))
    for key, x in matrices.items():
        if key not in initial or initial[key].shape[0] != x.shape[0]:
            shape = initial[key].shape if key in initial else "missing"
            raise InputError(
                f"start/ is not the initialisation of this adapter: {name}.{key} has "
                f"shape {x.shape} in the adapter, {shape} in start/. Move start/ "
                "away, or copy the adapter out of the run."
            )
    return initial


def _layer_and_kind(name: str) -> tuple[int | None, str]:
    """Split "model.layers.0.self_attn.q_proj" into 0 and "self_attn.q_proj"."""
    match = re.fullmatch(r"(.*?\.|)(\d+)\.(.+)", name)
    if match is None:
        return None, name
    prefix, layer, kind = match.groups()
    return int(layer), prefix.removeprefix("model.layers.") + kind


def _order(name: str) -> tuple[float, int, str]:
    layer, kind = _layer_and_kind(name)
    projection = kind.rpartition(".")[2].removesuffix("_proj")
    known = projection in _PROJECTIONS
    position = _PROJECTIONS.index(projection) if known else len(_PROJECTIONS)
    return math.inf if layer is None else layer, position, name


def _declared(adapter: "AdapterFile") -> dict[str, Factor]:
    """The factors that the adapter's method declares, by name."""
    return adapter_class(adapter.config.method).factors(adapter.config)


def factor_matrices(
    module: "ModuleFactors", declared: Mapping[str, Factor]
) -> dict[str, np.ndarray]:
    """The factors of a module that are matrices, in the order of their declaration.

    A vector over the rank is a diagonal matrix; a vector over outputs, such as DoRA's
    magnitudes, is not included. A fixed factor is, in place of a trained one, but not
    if it is added to a trained factor with the same axes (the A₀ and B₀ of
    initialisations that correct the base).
    """
    trained_axes = {factor.axes for factor in declared.values() if factor.trained}
    matrices = {}
    for name, factor in declared.items():
        is_correction = not factor.trained and factor.axes in trained_axes
        if name in module.factors and "rank" in factor.axes and not is_correction:
            x = module.factors[name]
            matrices[name] = np.diag(x) if x.ndim == 1 else x
    return matrices


def gram_matrices(adapter: "AdapterFile") -> dict[str, dict[str, np.ndarray]]:
    """XᵀX of the constrained factors, or else of the output factor, by module."""
    declared = _declared(adapter)
    names = [k for k, factor in declared.items() if _is_constrained(factor.manifold)]
    names = names or [k for k, f in declared.items() if f.axes == ("out", "rank")]
    return {
        name: {
            key: gram(x)
            for key, x in factor_matrices(module, declared).items()
            if key in names
        }
        for name, module in adapter.modules.items()
    }


def _is_constrained(manifold: Manifold | None) -> bool:
    return manifold is not None and not isinstance(manifold, Euclidean)


def _spectrum(x: np.ndarray) -> dict[str, Any]:
    return {
        "rank_used": int(numerical_rank(x)),
        "effective_rank": float(effective_rank(x)),
        "stable_rank": float(stable_rank(x)),
        "singular_values": singular_values(x).tolist(),
    }


def _update_measures(module: "ModuleFactors") -> dict[str, Any]:
    b = module.scale * module.b.astype(np.float64)
    spectrum = _spectrum(compressed_product(b, module.a))
    largest = largest_entries(b, module.a)
    return spectrum | {
        "norm": math.hypot(*spectrum["singular_values"]),
        "largest_weights": [entry._asdict() for entry in largest],
    }


def _factor_measures(
    x: np.ndarray, manifold: Manifold | None, initial: np.ndarray | None
) -> dict[str, Any]:
    residual = None
    if manifold is not None and _is_constrained(manifold):
        residual = float(manifold.residual(jnp.asarray(x)))
    cosines = column_cosines(x)
    angles = np.zeros(0)
    # The columns of a square factor of full rank span the whole space.
    if initial is not None and x.shape[0] > x.shape[1]:
        angles = principal_angles(initial, x)
    has_angles = angles.size > 0
    return {
        "manifold": "fixed" if manifold is None else type(manifold).__name__,
        "shape": list(x.shape),
        **_spectrum(x),
        "residual": residual,
        "cosine_mean": _none_if_nan(cosines.mean),
        "cosine_std": _none_if_nan(cosines.std),
        "cosine_max": _none_if_nan(cosines.largest),
        "angle_mean": float(angles.mean()) if has_angles else None,
        "angle_largest": float(angles.max()) if has_angles else None,
    }


def _none_if_nan(x: float) -> float | None:
    return None if math.isnan(x) else x


def _average(modules: Mapping[str, Any]) -> dict[str, Any]:
    """The measures of several modules: means, and maxima of `_MAXIMA`."""
    rows = list(modules.values())
    name, largest = max(
        ((name, m["delta_w"]["largest_weights"][0]) for name, m in modules.items()),
        key=lambda item: abs(item[1]["value"]),
    )
    location = {"module": name, "layer": modules[name]["layer"]}
    names = dict.fromkeys(key for row in rows for key in row["factors"])
    return {
        "modules": len(rows),
        "rank": _mean([row["rank"] for row in rows]),
        "delta_w": {
            key: _mean([row["delta_w"][key] for row in rows])
            for key in ("rank_used", "effective_rank", "stable_rank", "norm")
        }
        | {"largest_weight": location | largest},
        "factors": {
            name: _average_factor(
                [row["factors"][name] for row in rows if name in row["factors"]]
            )
            for name in names
        },
    }


def _average_factor(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    averaged: dict[str, Any] = {}
    for key in rows[0]:
        if key not in ("manifold", "shape", "singular_values"):
            values = [row[key] for row in rows if row[key] is not None]
            maximum = key in _MAXIMA
            averaged[key] = max(values, default=None) if maximum else _mean(values)
    return averaged


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
