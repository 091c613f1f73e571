"""Manifold-LoRA with the columns of B attracted to length 1."""

import jax
import jax.numpy as jnp

from manifold_lora.adapters.config import AdapterConfig
from manifold_lora.adapters.factor import Factor
from manifold_lora.adapters.initialisers import random_point, tall_shapes
from manifold_lora.adapters.landing_stiefel import LandingOptions
from manifold_lora.adapters.lora import LoRALinear
from manifold_lora.adapters.low_rank import Arrays
from manifold_lora.manifolds import Oblique


class LandingObliqueLinear(LoRALinear):
    """y = W x + s B (Aᵀ x), with columns of B attracted to length 1, in any directions.

    The weaker constraint of Manifold-LoRA ("sphere" in its tables): columns may
    become parallel. Otherwise as `LandingStiefelLinear`.

    References:
        "Retraction-free optimization over the Stiefel manifold with application to
        the LoRA fine-tuning" (Manifold-LoRA), 2024, algorithm 1.
    """

    options = LandingOptions

    @staticmethod
    def factors(config: AdapterConfig) -> dict[str, Factor]:
        """A is free, B near the oblique manifold."""
        return {
            "a": Factor(("in", "rank")),
            "b": Factor(("out", "rank"), Oblique(), padding="identity"),
        }

    @staticmethod
    def init(
        key: jax.Array, kernel: jax.Array, rank: int, config: AdapterConfig
    ) -> Arrays:
        """Random unit columns in B, and A = 0."""
        a_shape, b_shape = tall_shapes(kernel, rank)
        b = random_point(Oblique(), key, b_shape)
        return {"a": jnp.zeros(a_shape, jnp.float32), "b": b}
