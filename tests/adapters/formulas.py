"""A NumPy reference in float64: the adapted weight of every method."""

from collections.abc import Callable, Mapping

import numpy as np

from manifold_lora.adapters.attach import projections
from manifold_lora.adapters.scaled import ScaledLinear
from manifold_lora.models import Llama
from tests import adapters as tiny
from tests.models.reference import Tensors

Arrays = Mapping[str, np.ndarray]
Scale = float | Mapping[str, float]  # the s of ΔW, the same or by full name


def two_factors(w: np.ndarray, x: Arrays, s: float) -> np.ndarray:
    total = w + s * x["b"] @ x["a"].T
    return total - s * x["b0"] @ x["a0"].T if "b0" in x else total


def row_norms(w: np.ndarray, x: Arrays, s: float) -> np.ndarray:
    return np.sqrt((two_factors(w, x, s) ** 2).sum(1))  # of the rows: over the inputs


def with_magnitudes(w: np.ndarray, x: Arrays, s: float) -> np.ndarray:
    return x["m"][:, None] * two_factors(w, x, s) / row_norms(w, x, s)[:, None]


def three_factors(w: np.ndarray, x: Arrays, s: float) -> np.ndarray:
    middle = x["s"] if x["s"].ndim == 2 else np.diag(x["s"])
    return w + s * x["u"] @ middle @ x["v"].T


def bounded(w: np.ndarray, x: Arrays, s: float) -> np.ndarray:
    return w + s * x["a"] @ x["v"].T


NEW_WEIGHT: dict[str, Callable[[np.ndarray, Arrays, float], np.ndarray]] = {
    "lora": two_factors,
    "dora": with_magnitudes,
    "stiefel": two_factors,
    "stiefel_dora": with_magnitudes,
    "stella": three_factors,
    "loram_fr": three_factors,
    "loram_br": bounded,
    "landing_stiefel": two_factors,
    "landing_oblique": two_factors,
}


def diagonals(model: Llama) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """D₁ and D₂ of every layer of a projection that has them, by full name."""
    by_layer = {}
    for name, parent, attribute in projections(model):
        module = getattr(parent, attribute)
        if isinstance(module, ScaledLinear):
            d1, d2 = (np.asarray(d[...], np.float64) for d in (module.d1, module.d2))
            for layer in range(tiny.LAYERS):
                by_layer[f"model.layers.{layer}.{name}"] = d1[layer], d2[layer]
    return by_layer


def weights(
    method: str,
    factors: Mapping[str, Arrays],
    scale: Scale,
    scaled: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = None,
) -> Tensors:
    """The tensors of the base with the adapted weights in their places.

    Args:
        method: its name.
        factors: the arrays by full name, from `tiny.arrays`.
        scale: alpha/r or alpha/√r.
        scaled: D₁ and D₂ by full name, from `diagonals`.
    """
    tensors = {name: np.asarray(x, np.float64) for name, x in tiny.TENSORS.items()}
    for full, x in factors.items():
        s = scale[full] if isinstance(scale, Mapping) else scale
        w = tensors[f"{full}.weight"]
        new = NEW_WEIGHT[method](w, x, s)
        if scaled:
            d1, d2 = scaled[full]
            new = new + d1[:, None] * w * d2 - w
        tensors[f"{full}.weight"] = new
    return tensors
