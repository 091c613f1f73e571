"""Stiefel-LoRA with DoRA's magnitude vector."""

import dataclasses

import jax

from manifold_lora.adapters.config import AdapterConfig
from manifold_lora.adapters.dora import MAGNITUDE, DoRALinear, row_norms
from manifold_lora.adapters.factor import Factor
from manifold_lora.adapters.low_rank import Arrays
from manifold_lora.adapters.stiefel import StiefelLinear, StiefelLoRAOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class StiefelDoRAOptions(StiefelLoRAOptions):
    """Options of Stiefel-LoRA with DoRA's magnitude vector."""

    update = "m ⊙ (W + s B Aᵀ)/‖W + s B Aᵀ‖ − W"
    export = "DoRA"


class StiefelDoRALinear(DoRALinear):
    """DoRA whose B keeps orthonormal columns; A is initialised to zero.

    References:
        "Riemannian optimization for LoRA on the Stiefel manifold", 2025,
        arXiv:2508.17901; Liu et al., "DoRA", 2024, arXiv:2402.09353.
    """

    options = StiefelDoRAOptions

    @staticmethod
    def factors(config: AdapterConfig) -> dict[str, Factor]:
        """Those of Stiefel-LoRA, and a free m."""
        return StiefelLinear.factors(config) | {"m": MAGNITUDE}

    @staticmethod
    def init(
        key: jax.Array, kernel: jax.Array, rank: int, config: AdapterConfig
    ) -> Arrays:
        """Orthonormal B, A = 0 and m = ‖W‖."""
        return {**StiefelLinear.init(key, kernel, rank, config), "m": row_norms(kernel)}
