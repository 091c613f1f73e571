"""LoRAM-FR: ΔW = s U S Vᵀ on the matrices of fixed rank."""

import dataclasses
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from manifold_lora.adapters.config import AdapterConfig
from manifold_lora.adapters.factor import Factor
from manifold_lora.adapters.initialisers import orthonormal
from manifold_lora.adapters.low_rank import Arrays
from manifold_lora.adapters.options import (
    LearningRates,
    MethodOptions,
    OptimizerInputs,
    initialisation,
)
from manifold_lora.adapters.products import (
    sum_over_tokens,
    tall_product,
    wide_product,
)
from manifold_lora.adapters.three_factors import ThreeFactorLinear
from manifold_lora.errors import InputError
from manifold_lora.manifolds import Euclidean, FixedRank, Stiefel
from manifold_lora.models import Linear
from manifold_lora.optimizers import loram
from manifold_lora.settings import setting

S0 = 1e-3  # of the initial S = s₀I; 1e-4 and 1e-2 train worse


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAMOptions(MethodOptions):
    """Options of both LoRAMs."""

    recipe = "loram"
    paper = "LoRAM 2025"

    second_moment: Literal["row", "coordinate", "scalar"] = setting(
        "row", "what one second moment is of", role="optimizer"
    )
    diagonal_scaling: bool = setting(
        False, "D₁ W D₂ + ΔW in place of W + ΔW; can only be merged", role="adapter"
    )

    def transformation(self, inputs: OptimizerInputs) -> optax.GradientTransformation:
        """Riemannian Adam with transported momentum."""
        return loram(
            inputs.learning_rate,
            inputs.manifolds,
            second_moment=self.second_moment,
            weight_decay=inputs.weight_decay,
            nuclear_decay=getattr(self, "nuclear_decay", 0.0),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAMFixedOptions(LoRAMOptions):
    """Options of LoRAM-FR; `LoRAMFixedLinear` explains the initialisations."""

    update = "s U S Vᵀ"
    learning_rates = LearningRates(5e-5, builtin=1e-3, grid=(3e-5, 5e-5, 1e-4))

    init: Literal["identity", "zero"] = initialisation("identity")


class LoRAMFixedLinear(ThreeFactorLinear):
    """y = W x + s U S (Vᵀ x), moved as one matrix of rank r by `manifold_lora.loram`.

    Its "gradients" are not those of the chain rule: see `fixed_rank_product`. Use them
    with `manifold_lora.loram` or `riemannian`, not with a plain optimiser.

    The initialisations, both with uniform U and V:

    - "identity": S = s₀I with a small s₀: a point of the manifold, whose ΔW is small
      but not zero;
    - "zero": S = 0, the paper's, so that ΔW = 0, bit for bit. It is not a point of the
      manifold, and only the retraction by truncation leaves it, which calls LAPACK
      and may hang on small CPUs (see `FixedRank.retract`).

    References:
        Jiang, Wang & Stich, "LoRAM: Low-rank adaptation of large language models on
        manifold", 2025, algorithms 1 to 4.
    """

    options = LoRAMFixedOptions

    def __init__(self, base: Linear, config: AdapterConfig, **options: Any):
        super().__init__(base, config, **options)
        if config.options.init == "zero" and len(ranks := {*self.ranks} - {0}) > 1:
            # Truncation mixes a layer's columns with its padding.
            raise InputError(
                "loram_fr with init zero needs one rank in all layers, got "
                f"{', '.join(map(str, sorted(ranks)))}: take init identity, or "
                "leave out --rank-pattern for some of the layers."
            )

    @classmethod
    def factors(cls, config: AdapterConfig) -> dict[str, Factor]:
        """U, S and V are one point; what pads S must be regular, too."""
        point = FixedRank(
            "truncation" if config.options.init == "zero" else "orthographic"
        )
        part = partial(Factor, part_of=point, padding="identity")
        return {
            "u": part(("out", "rank"), Stiefel()),
            "s": part(("rank", "rank"), Euclidean()),
            "v": part(("in", "rank"), Stiefel()),
        }

    @classmethod
    def init(
        cls, key: jax.Array, kernel: jax.Array, rank: int, config: AdapterConfig
    ) -> Arrays:
        """U, S and V."""
        v, u = orthonormal(key, kernel, rank)
        size = 0.0 if config.options.init == "zero" else S0
        s = jnp.broadcast_to(size * jnp.eye(rank), (*kernel.shape[:-2], rank, rank))
        return {"u": u, "s": s, "v": v}

    def delta(self, x: jax.Array) -> jax.Array:
        """The update s U S (Vᵀ x), with the gradients of `fixed_rank_product`."""
        u, s, v = map(self.factor, "usv")
        return fixed_rank_product(x, self.scale[...], u, s, v)


@jax.custom_vjp
def fixed_rank_product(
    x: jax.Array, scale: jax.Array, u: jax.Array, s: jax.Array, v: jax.Array
) -> jax.Array:
    """Compute y = s · x V Sᵀ Uᵀ, whose gradients are those that `FixedRank` needs.

    With G = ∂f/∂(U S Vᵀ) the gradients of u, s and v are **G V, UᵀG V and GᵀU**, and
    not the chain rule's G V Sᵀ, UᵀG V and GᵀU S, which carry a factor S and vanish at
    S = 0. They are linear in G, so that clipping, accumulation and sums over devices
    stay valid, and no m×n matrix is formed. G includes the scale. The gradient of x is
    the chain rule's; scale has none.

    Args:
        x: (…, in) in the dtype of the products.
        scale: the s of ΔW, a number.
        u: (out, r) float32.
        s: the matrix S, (r, r) float32.
        v: (in, r) float32.

    Returns:
        (…, out) in the dtype of x.

    References:
        LoRAM, algorithm 2, without its extra parameters.
    """
    return _product(x, scale, u, s, v)


def _product(x: Any, scale: Any, u: Any, s: Any, v: Any) -> jax.Array:
    return wide_product(wide_product(tall_product(x, v), s), scale * u)


def _forward(*arguments: jax.Array) -> tuple[jax.Array, tuple]:
    return _product(*arguments), arguments


def _backward(arguments: tuple, dy: jax.Array) -> tuple:
    x, scale, u, s, v = arguments
    xv, dyu = tall_product(x, v), tall_product(dy, scale * u)
    dx = wide_product(tall_product(dyu, s), v)
    gv = scale * sum_over_tokens(dy, xv)
    gs, gu = sum_over_tokens(dyu, xv), sum_over_tokens(x, dyu)
    return dx, jnp.zeros_like(scale), gv, gs, gu


fixed_rank_product.defvjp(_forward, _backward)
