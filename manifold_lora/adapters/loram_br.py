"""LoRAM-BR: ΔW = s A Vᵀ on the bounded-rank matrices, desingularised."""

import jax
import jax.numpy as jnp

from manifold_lora.adapters.config import AdapterConfig
from manifold_lora.adapters.low_rank import Arrays, LowRankLinear
from manifold_lora.adapters.starts import orthonormal, tall_shapes
from manifold_lora.manifolds import BoundedRank, Manifold


class LoRAMBoundedLinear(LowRankLinear):
    """y = W x + s A (Vᵀ x), with A (out, r) free and V (in, r) orthonormal, coupled.

    The pair moves as one matrix of rank at most r, by `manifold_lora.loram`, and
    plain gradients of A and V are all that needs. A starts at zero, which is a point
    like any other: the model starts as its base, bit for bit. The rank may fall; what
    is below a threshold can be cut away on export.

    A is on the side of the outputs here, as in `BoundedRank`.

    References:
        Jiang, Wang & Stich, "LoRAM: Low-rank adaptation of large language models on
        manifold", 2025, algorithms 5 to 8.
    """

    sides = {"a": "out", "v": "in"}

    @staticmethod
    def manifolds(config: AdapterConfig) -> dict[str, Manifold]:
        """A and V are one point."""
        return dict.fromkeys(("a", "v"), BoundedRank())

    @staticmethod
    def start(
        key: jax.Array, kernel: jax.Array, rank: int, config: AdapterConfig
    ) -> Arrays:
        """A = 0, and V uniform."""
        v, _ = orthonormal(key, kernel, rank)
        return {"a": jnp.zeros(tall_shapes(kernel, rank)[1], jnp.float32), "v": v}

    def delta(self, x: jax.Array) -> jax.Array:
        """S A (Vᵀ x)."""
        a = (self.scale[...][..., None, None] * self.outputs("a")).astype(x.dtype)
        return (x @ self.inputs("v").astype(x.dtype)) @ a.mT

    def pair(self) -> tuple[jax.Array, jax.Array]:
        """V and A: LoRA's A and B."""
        return self.inputs("v"), self.outputs("a")
