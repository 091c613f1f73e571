"""Manifold-LoRA with the columns of B attracted to length 1."""

from manifold_lora.adapters.landing_stiefel import LandingStiefelLinear
from manifold_lora.manifolds import Oblique


class LandingObliqueLinear(LandingStiefelLinear):
    """y = W x + s B (Aᵀ x), with columns of B attracted to length 1, in any directions.

    The weaker constraint of Manifold-LoRA ("sphere" in its tables): columns may
    become parallel. Otherwise as `LandingStiefelLinear`.

    References:
        "Retraction-free optimization over the Stiefel manifold with application to
        the LoRA fine-tuning" (Manifold-LoRA), 2024, algorithm 1.
    """

    manifold = Oblique()
