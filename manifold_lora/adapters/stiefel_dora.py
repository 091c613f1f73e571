"""Stiefel-LoRA with DoRA's magnitudes."""

import jax

from manifold_lora.adapters.config import AdapterConfig
from manifold_lora.adapters.dora import DoRALinear, row_norms
from manifold_lora.adapters.low_rank import Arrays
from manifold_lora.adapters.stiefel import StiefelLinear
from manifold_lora.manifolds import Euclidean, Manifold


class StiefelDoRALinear(DoRALinear):
    """DoRA whose B keeps orthonormal columns; A starts at zero.

    References:
        "Riemannian optimization for LoRA on the Stiefel manifold", 2025,
        arXiv:2508.17901; Liu et al., "DoRA", 2024, arXiv:2402.09353.
    """

    @staticmethod
    def manifolds(config: AdapterConfig) -> dict[str, Manifold]:
        """Those of Stiefel-LoRA, and a free m."""
        return StiefelLinear.manifolds(config) | {"m": Euclidean()}

    @staticmethod
    def start(
        key: jax.Array, kernel: jax.Array, rank: int, config: AdapterConfig
    ) -> Arrays:
        """Orthonormal B, A = 0 and m = ‖W‖."""
        return StiefelLinear.start(key, kernel, rank, config) | {"m": row_norms(kernel)}
