"""Manifold-LoRA with B attracted to the Stiefel manifold."""

from manifold_lora.adapters.config import AdapterConfig
from manifold_lora.adapters.factor import Factor
from manifold_lora.adapters.stiefel import StiefelLinear
from manifold_lora.manifolds import Stiefel


class LandingStiefelLinear(StiefelLinear):
    """y = W x + s B (Aᵀ x), with B pulled to orthonormal columns but not held there.

    Trained by `manifold_lora.landing_adamw`, without retraction: B is near the
    manifold, not on it. It is initialised as Stiefel-LoRA, with B orthonormal and
    A = 0: from LoRA's B = 0 it would never land.

    References:
        "Retraction-free optimization over the Stiefel manifold with application to
        the LoRA fine-tuning" (Manifold-LoRA), 2024, algorithm 1.
    """

    @staticmethod
    def factors(config: AdapterConfig) -> dict[str, Factor]:
        """A is free, B near the Stiefel manifold."""
        return {
            "a": Factor(("in", "rank")),
            "b": Factor(("out", "rank"), Stiefel(), padding="identity"),
        }
