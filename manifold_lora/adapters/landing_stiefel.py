"""Manifold-LoRA with B attracted to the Stiefel manifold."""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import optax

from manifold_lora.adapters.config import AdapterConfig
from manifold_lora.adapters.factor import Factor
from manifold_lora.adapters.initialisers import random_point, tall_shapes
from manifold_lora.adapters.lora import LoRALinear
from manifold_lora.adapters.low_rank import Arrays
from manifold_lora.adapters.options import (
    LearningRates,
    OptimizerInputs,
    WrapperOptions,
    initialisation,
)
from manifold_lora.manifolds import Manifold, Stiefel
from manifold_lora.optimizers import landing_adamw
from manifold_lora.settings import PositiveFloat, setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class LandingOptions(WrapperOptions):
    """Options of Manifold-LoRA, on either manifold."""

    recipe = "landing_adamw"
    update = "s B Aᵀ"
    paper = "Manifold-LoRA 2024"
    learning_rates = LearningRates(2e-4, builtin=5e-3, grid=(2e-4, 5e-4, 1e-3))

    init: Literal["random"] = initialisation("random")
    penalty_weight: PositiveFloat = setting(
        1.0, "weight μ of the penalty that attracts to the manifold", role="optimizer"
    )
    rate_bounds: tuple[PositiveFloat, PositiveFloat] = setting(
        (0.5, 4.0), "least and largest multiple of the learning rate", role="optimizer"
    )
    project_on_export: bool = setting(
        False, "save the nearest point of the manifold", role="export"
    )

    def problems(self) -> list[str]:
        """The bounds must be in order."""
        lower, upper = self.rate_bounds
        if lower <= upper:
            return []
        return [f"rate_bounds needs least ≤ largest, got {lower} and {upper}"]

    def transformation(self, inputs: OptimizerInputs) -> optax.GradientTransformation:
        """AdamW, or another optimiser, with the landing field."""
        lower, upper = self.rate_bounds
        return landing_adamw(
            inputs.learning_rate,
            inputs.manifolds,
            penalty_weight=self.penalty_weight,
            lower=lower,
            upper=upper,
            weight_decay=inputs.weight_decay,
            # Its own AdamW decays the free factors only.
            inner=None if self.optimizer == "adamw" else self.inner(inputs),
        )


class LandingStiefelLinear(LoRALinear):
    """y = W x + s B (Aᵀ x), with B attracted to orthonormal columns but not held there.

    Trained by `manifold_lora.landing_adamw`, without retraction: B is near the
    manifold, not on it. It is initialised as Stiefel-LoRA, with B orthonormal and
    A = 0: from LoRA's B = 0 it would never land.

    References:
        "Retraction-free optimization over the Stiefel manifold with application to
        the LoRA fine-tuning" (Manifold-LoRA), 2024, algorithm 1.
    """

    options = LandingOptions
    manifold: ClassVar[Manifold] = Stiefel()

    @classmethod
    def factors(cls, config: AdapterConfig) -> dict[str, Factor]:
        """A is free, B near the manifold."""
        return {
            "a": Factor(("in", "rank")),
            "b": Factor(("out", "rank"), cls.manifold, padding="identity"),
        }

    @classmethod
    def init(
        cls, key: jax.Array, kernel: jax.Array, rank: int, config: AdapterConfig
    ) -> Arrays:
        """A random point for B, and A = 0."""
        a_shape, b_shape = tall_shapes(kernel, rank)
        b = random_point(cls.manifold, key, b_shape)
        return {"a": jnp.zeros(a_shape, jnp.float32), "b": b}
