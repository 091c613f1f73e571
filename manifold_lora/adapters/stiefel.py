"""Stiefel-LoRA: ΔW = s B Aᵀ with orthonormal B and free A."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from manifold_lora.adapters.config import AdapterConfig
from manifold_lora.adapters.factor import Factor
from manifold_lora.adapters.initialisers import projection, random_point, tall_shapes
from manifold_lora.adapters.lora import LoRALinear, a_factor, fixed_a
from manifold_lora.adapters.low_rank import Arrays
from manifold_lora.adapters.options import (
    LearningRates,
    OptimizerInputs,
    WrapperOptions,
    initialisation,
)
from manifold_lora.manifolds import Stiefel
from manifold_lora.optimizers import stiefel_lora
from manifold_lora.settings import UNSET, PositiveFloat, setting

_FREE_RATES = LearningRates(2e-4, builtin=5e-3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StiefelLoRAOptions(WrapperOptions):
    """Options of methods that `manifold_lora.stiefel_lora` trains."""

    recipe = "stiefel_lora"
    paper = "Stiefel-LoRA 2025, arXiv:2508.17901"
    learning_rates = LearningRates(0.1, builtin=0.03, grid=(0.1, 0.2, 0.3))
    free_learning_rates = _FREE_RATES

    init: Literal["random"] = initialisation("random")
    free_learning_rate: PositiveFloat = setting(
        UNSET, "of the free factors", default_text=_FREE_RATES.text(), role="rate"
    )

    def transformation(self, inputs: OptimizerInputs) -> optax.GradientTransformation:
        """Two learning rates, and the QR retraction."""
        assert inputs.free_learning_rate is not None
        return stiefel_lora(
            inputs.learning_rate,
            inputs.manifolds,
            free_learning_rate=inputs.free_learning_rate,
            inner=self.inner(inputs),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class StiefelOptions(StiefelLoRAOptions):
    """Options of Stiefel-LoRA."""

    update = "s B Aᵀ"

    fixed_a: Literal["random", "projection"] | None = setting(
        None, "do not train A, but fix it", role="adapter"
    )


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

    options = StiefelOptions

    @classmethod
    def factors(cls, config: AdapterConfig) -> dict[str, Factor]:
        """B is on the Stiefel manifold; A is free, or not trained."""
        return {
            "a": a_factor(config),
            "b": Factor(("out", "rank"), Stiefel("qr"), padding="identity"),
        }

    @classmethod
    def init(
        cls, key: jax.Array, kernel: jax.Array, rank: int, config: AdapterConfig
    ) -> Arrays:
        """Orthonormal B, and A = 0 or the fixed one."""
        a_shape, b_shape = tall_shapes(kernel, rank)
        b = random_point(Stiefel("qr"), key, b_shape)
        if fixed_a(config) == "projection":
            a = projection(kernel, b)
        elif fixed_a(config) == "random":
            a = LoRALinear.init(jax.random.fold_in(key, 1), kernel, rank, config)["a"]
        else:
            a = jnp.zeros(a_shape, jnp.float32)
        return {"a": a, "b": b}
