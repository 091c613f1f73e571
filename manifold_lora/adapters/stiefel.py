"""Stiefel-LoRA: ΔW = s B Aᵀ with orthonormal B and free A."""

from typing import ClassVar

import jax
import jax.numpy as jnp

from manifold_lora.adapters.lora import LoRALinear
from manifold_lora.manifolds import Euclidean, Manifold, Stiefel


class StiefelLinear(LoRALinear):
    """A frozen linear layer and an update whose B keeps orthonormal columns.

    B stays on the Stiefel manifold, so that all r directions of the output are used
    (entropy effective rank r) where LoRA's collapse. B starts orthonormal and
    random, A at zero: the model starts as its base, bit for bit. Train it with
    `manifold_lora.stiefel_lora`.

    References:
        "Riemannian optimization for LoRA on the Stiefel manifold", 2025,
        arXiv:2508.17901.
    """

    manifolds: ClassVar[dict[str, Manifold]] = {"a": Euclidean(), "b": Stiefel("qr")}

    @staticmethod
    def start(
        key: jax.Array, a_shape: tuple[int, ...], b_shape: tuple[int, ...]
    ) -> tuple[jax.Array, jax.Array]:
        """A = 0, and B uniform on the Stiefel manifold."""
        return jnp.zeros(a_shape, jnp.float32), Stiefel("qr").random_point(key, b_shape)
