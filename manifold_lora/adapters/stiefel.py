"""Stiefel-LoRA: ΔW = s B Aᵀ with orthonormal B and free A."""

import jax
import jax.numpy as jnp

from manifold_lora.adapters.config import AdapterConfig
from manifold_lora.adapters.factor import Factor
from manifold_lora.adapters.initialisers import projection, random_point, tall_shapes
from manifold_lora.adapters.lora import LoRALinear, a_factor
from manifold_lora.adapters.low_rank import Arrays
from manifold_lora.manifolds import Stiefel


class StiefelLinear(LoRALinear):
    """y = W x + s B (Aᵀ x), with orthonormal columns of B (out, r).

    B stays on the Stiefel manifold, so that all r directions of the output are used
    (entropy effective rank r) where LoRA's collapse. B is initialised to the Q of a
    random matrix, uniform on the manifold, and A to zero, so that ΔW = 0, bit for bit.
    Train it with `manifold_lora.stiefel_lora`.

    The paper's ablations fix A, which then cannot be zero, so that ΔW is not zero at
    initialisation: `fixed_a="random"` takes LoRA's uniform A, "projection" takes
    A = WᵀB of the initial B.

    References:
        "Riemannian optimization for LoRA on the Stiefel manifold", 2025,
        arXiv:2508.17901, section 4.3 for the ablations.
    """

    @staticmethod
    def factors(config: AdapterConfig) -> dict[str, Factor]:
        """B is on the Stiefel manifold; A is free, or not trained."""
        return {
            "a": a_factor(config),
            "b": Factor(("out", "rank"), Stiefel("qr"), padding="identity"),
        }

    @staticmethod
    def init(
        key: jax.Array, kernel: jax.Array, rank: int, config: AdapterConfig
    ) -> Arrays:
        """Orthonormal B, and A = 0 or the fixed one."""
        a_shape, b_shape = tall_shapes(kernel, rank)
        b = random_point(Stiefel("qr"), key, b_shape)
        if config.fixed_a == "projection":
            a = projection(kernel, b)
        elif config.fixed_a == "random":
            a = LoRALinear.init(jax.random.fold_in(key, 1), kernel, rank, config)["a"]
        else:
            a = jnp.zeros(a_shape, jnp.float32)
        return {"a": a, "b": b}
