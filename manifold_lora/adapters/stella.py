"""StelLA: ΔW = s U S Vᵀ with orthonormal U and V."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from manifold_lora.adapters.config import AdapterConfig
from manifold_lora.adapters.factor import Factor
from manifold_lora.adapters.initialisers import orthonormal, singular_vectors
from manifold_lora.adapters.low_rank import Arrays
from manifold_lora.adapters.options import (
    LearningRates,
    OptimizerInputs,
    WrapperOptions,
    initialisation,
)
from manifold_lora.adapters.three_factors import ThreeFactorLinear
from manifold_lora.manifolds import Stiefel
from manifold_lora.optimizers import stella
from manifold_lora.settings import setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class StellaOptions(WrapperOptions):
    """Options of StelLA; `StellaLinear` explains the initialisations."""

    recipe = "stella"
    update = "s U S Vᵀ"
    paper = "StelLA 2025, arXiv:2510.01938"
    learning_rates = LearningRates(5e-4, builtin=5e-3, grid=(2e-4, 5e-4, 1e-3))

    init: Literal["random", "zero", "svd_major", "svd_minor"] = initialisation("random")
    diagonal_s: bool = setting(False, "S is a diagonal", role="adapter")

    def transformation(self, inputs: OptimizerInputs) -> optax.GradientTransformation:
        """Canonical gradient, optimiser, projection and polar retraction."""
        return stella(
            inputs.learning_rate,
            inputs.manifolds,
            hidden_size=inputs.hidden_size,
            inner=self.inner(inputs),
        )


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

    options = StellaOptions

    @classmethod
    def factors(cls, config: AdapterConfig) -> dict[str, Factor]:
        """U and V are on the Stiefel manifold, S is free."""
        return {
            "u": Factor(("out", "rank"), Stiefel(), padding="identity"),
            "s": Factor(("rank",) if _options(config).diagonal_s else ("rank", "rank")),
            "v": Factor(("in", "rank"), Stiefel(), padding="identity"),
        }

    @classmethod
    def init(
        cls, key: jax.Array, kernel: jax.Array, rank: int, config: AdapterConfig
    ) -> Arrays:
        """U, S and V."""
        init = config.options.init
        if init in ("svd_major", "svd_minor"):
            v, _, u = singular_vectors(kernel)
            place = slice(rank) if init == "svd_major" else slice(-rank, None)
            v, u = v[..., place], u[..., place]
        else:
            v, u = orthonormal(key, kernel, rank)
        one = jnp.ones(rank) if _options(config).diagonal_s else jnp.eye(rank)
        s = jnp.broadcast_to(one, (*kernel.shape[:-2], *one.shape))
        return {"u": u, "s": 0 * s if init == "zero" else s, "v": v}


def _options(config: AdapterConfig) -> StellaOptions:
    assert isinstance(config.options, StellaOptions)
    return config.options
