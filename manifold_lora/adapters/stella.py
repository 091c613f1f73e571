"""StelLA: ΔW = s U S Vᵀ with orthonormal U and V."""

import jax
import jax.numpy as jnp

from manifold_lora.adapters.config import AdapterConfig
from manifold_lora.adapters.factor import Factor
from manifold_lora.adapters.initialisers import orthonormal, singular_vectors
from manifold_lora.adapters.low_rank import Arrays
from manifold_lora.adapters.three_factors import ThreeFactorLinear
from manifold_lora.manifolds import Stiefel


class StellaLinear(ThreeFactorLinear):
    """y = W x + s U S (Vᵀ x), with orthonormal U and V, and S free.

    The three factors move independently, by `manifold_lora.stella`. S is dense, or a
    diagonal with `diagonal_s`. The initialisations:

    - "random": U and V uniform and S = I, the paper's, where ΔW is not zero;
    - "zero": the same with S = 0, so that ΔW = 0, bit for bit;
    - "svd_major", "svd_minor": U and V the first or last singular vectors of W, S = I.

    References:
        Li, Sajadmanesh, Li & Lyu, "StelLA: Subspace learning in low-rank adaptation
        using Stiefel manifold", 2025, arXiv:2510.01938.
    """

    @staticmethod
    def factors(config: AdapterConfig) -> dict[str, Factor]:
        """U and V are on the Stiefel manifold, S is free."""
        return {
            "u": Factor(("out", "rank"), Stiefel(), padding="identity"),
            "s": Factor(("rank",) if config.diagonal_s else ("rank", "rank")),
            "v": Factor(("in", "rank"), Stiefel(), padding="identity"),
        }

    @staticmethod
    def init(
        key: jax.Array, kernel: jax.Array, rank: int, config: AdapterConfig
    ) -> Arrays:
        """U, S and V."""
        if config.init in ("svd_major", "svd_minor"):
            v, _, u = singular_vectors(kernel)
            place = slice(rank) if config.init == "svd_major" else slice(-rank, None)
            v, u = v[..., place], u[..., place]
        else:
            v, u = orthonormal(key, kernel, rank)
        one = jnp.ones(rank) if config.diagonal_s else jnp.eye(rank)
        s = jnp.broadcast_to(one, (*kernel.shape[:-2], *one.shape))
        return {"u": u, "s": 0 * s if config.init == "zero" else s, "v": v}
