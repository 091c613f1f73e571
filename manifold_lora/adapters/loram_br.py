"""LoRAM-BR: ΔW = s A Vᵀ on the bounded-rank matrices, desingularised."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from manifold_lora.adapters.config import AdapterConfig
from manifold_lora.adapters.factor import Factor
from manifold_lora.adapters.initialisers import orthonormal, tall_shapes
from manifold_lora.adapters.loram_fr import LoRAMOptions
from manifold_lora.adapters.low_rank import Arrays, LowRankLinear
from manifold_lora.adapters.options import LearningRates, initialisation
from manifold_lora.adapters.products import tall_product, wide_product
from manifold_lora.manifolds import BoundedRank, Euclidean, Stiefel
from manifold_lora.settings import NonNegativeFloat, setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAMBoundedOptions(LoRAMOptions):
    """Options of LoRAM-BR."""

    update = "s A Vᵀ"
    learning_rates = LearningRates(1e-4, builtin=1e-3, grid=(5e-5, 1e-4, 2e-4))

    init: Literal["zero"] = initialisation("zero")
    nuclear_decay: NonNegativeFloat = setting(
        0.0, "λ, subtracted from every singular value in a step", role="optimizer"
    )
    truncate_below: NonNegativeFloat | None = setting(
        None, "drop smaller singular values on saving", role="export"
    )

    def problems(self) -> list[str]:
        """What can only be merged has no rank to lower."""
        if not self.diagonal_scaling or self.truncate_below is None:
            return []
        return [
            f"diagonal_scaling=True and truncate_below={self.truncate_below} exclude "
            "each other: what can only be merged has no rank to lower"
        ]


class LoRAMBoundedLinear(LowRankLinear):
    """y = W x + s A (Vᵀ x), with A (out, r) free and V (in, r) orthonormal, coupled.

    The pair moves as one matrix of rank at most r, by `manifold_lora.loram`, and
    plain gradients of A and V are all that needs. A is initialised to zero, which is a
    point like any other: ΔW = 0, bit for bit. The rank may fall; singular values below
    a threshold can be truncated on export.

    A is on the side of the outputs here, as in `BoundedRank`.

    References:
        Jiang, Wang & Stich, "LoRAM: Low-rank adaptation of large language models on
        manifold", 2025, algorithms 5 to 8.
    """

    options = LoRAMBoundedOptions

    @classmethod
    def factors(cls, config: AdapterConfig) -> dict[str, Factor]:
        """A and V are one point."""
        point = BoundedRank()
        return {
            "a": Factor(("out", "rank"), Euclidean(), part_of=point),
            "v": Factor(("in", "rank"), Stiefel(), part_of=point, padding="identity"),
        }

    @classmethod
    def init(
        cls, key: jax.Array, kernel: jax.Array, rank: int, config: AdapterConfig
    ) -> Arrays:
        """A = 0, and V uniform."""
        v, _ = orthonormal(key, kernel, rank)
        return {"a": jnp.zeros(tall_shapes(kernel, rank)[1], jnp.float32), "v": v}

    def delta(self, x: jax.Array) -> jax.Array:
        """The update s A (Vᵀ x)."""
        a = self.scale[...][..., None, None] * self.factor("a")
        return wide_product(tall_product(x, self.factor("v")), a)

    @staticmethod
    def product(arrays: Arrays) -> tuple[jax.Array, jax.Array]:
        """V and A: LoRA's A and B."""
        return arrays["v"], arrays["a"]
