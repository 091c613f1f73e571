"""LoRA: ΔW = s B Aᵀ with both factors free."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from manifold_lora.adapters.config import AdapterConfig
from manifold_lora.adapters.factor import Factor
from manifold_lora.adapters.initialisers import (
    orthonormal,
    projection,
    singular_vectors,
    tall_shapes,
)
from manifold_lora.adapters.low_rank import Arrays, LowRankLinear
from manifold_lora.adapters.options import (
    LearningRates,
    OptimizerInputs,
    WrapperOptions,
    initialisation,
)
from manifold_lora.adapters.products import tall_product, wide_product
from manifold_lora.optimizers import FactorSpec, lora_plus
from manifold_lora.settings import PositiveFloat, setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAPlusOptions(WrapperOptions):
    """Options of methods without constraints, trained by any optimiser or by LoRA+."""

    recipe = "adamw"
    learning_rates = LearningRates(2e-4, builtin=5e-3, grid=(1e-4, 2e-4, 3e-4))

    lora_plus_ratio: PositiveFloat | None = setting(
        None, "B's learning rate over A's (LoRA+)", default_text="1", role="optimizer"
    )

    def transformation(self, inputs: OptimizerInputs) -> optax.GradientTransformation:
        """The optimiser itself, or LoRA+."""
        inner, ratio = self.inner(inputs), self.lora_plus_ratio
        if ratio is None:
            return inner(inputs.learning_rate)
        return lora_plus(inputs.learning_rate, FactorSpec(), ratio=ratio, inner=inner)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAOptions(LoRAPlusOptions):
    """Options of LoRA; `LoRALinear` explains the initialisations."""

    update = "s B Aᵀ"
    paper = "Hu et al. 2021, arXiv:2106.09685"

    init: Literal["kaiming", "gaussian", "orthogonal", "pissa", "olora"] = (
        initialisation("kaiming")
    )
    fixed_a: Literal["random", "projection"] | None = setting(
        None, "do not train A, but fix it", role="adapter"
    )
    diagonal_scaling: bool = setting(
        False, "D₁ W D₂ + ΔW in place of W + ΔW; can only be merged", role="adapter"
    )

    def problems(self) -> list[str]:
        """A fixed A needs a random initialisation."""
        if self.fixed_a is None or self.init in ("kaiming", "gaussian"):
            return []
        return [
            f"init={self.init} and fixed_a={self.fixed_a} exclude each other: fixed_a "
            "goes with the initialisations kaiming and gaussian"
        ]

    def rank_problems(self, ranks: Sequence[int]) -> list[str]:
        """Orthogonal halves of a basis need an even rank."""
        odd = [rank for rank in ranks if rank % 2]
        if self.init != "orthogonal" or not odd:
            return []
        return [f"init orthogonal needs even ranks, got {odd[0]}"]


class LoRALinear(LowRankLinear):
    """y = W x + s B (Aᵀ x), with A (in, r) and B (out, r).

    The initialisations, by PEFT's names:

    - "kaiming": A uniform on ±1/√in, B = 0;
    - "gaussian": A normal with standard deviation 1/r, B = 0;
    - "orthogonal": A and B normal with standard deviation 1/10 on orthogonal halves of
      an r×r basis, so that B Aᵀ = 0 to rounding; r must be even;
    - "pissa": B Aᵀ the best approximation of W of rank r, divided by s;
    - "olora": B and Aᵀ the first r columns and rows of Q and R in W = QR.

    The last two would change the model. PEFT subtracts s B Aᵀ from the base weight;
    here the base stays as it is, and the initial factors are kept as a fixed
    correction −s B₀A₀ᵀ, exact and of rank 2r in an export. With all but "orthogonal"
    ΔW = 0 at initialisation, bit for bit.

    With `fixed_a` only B is trained (the ablation of Stiefel-LoRA): A is random, or
    WᵀP with a random orthonormal P (out, r), a projection of the weight.

    References:
        Hu et al., "LoRA", 2021, arXiv:2106.09685; Kalajdzievski, "Rank-stabilized
        LoRA", 2023, arXiv:2312.03732, for the scale alpha/√r; Meng et al., "PiSSA",
        2024, arXiv:2404.02948; Büyükakyüz, "OLoRA", 2024, arXiv:2406.01775.
    """

    options = LoRAOptions

    a: nnx.Variable
    b: nnx.LoRAParam

    @classmethod
    def factors(cls, config: AdapterConfig) -> dict[str, Factor]:
        """A and B are free, A unless it is fixed; A₀ and B₀ are not trained."""
        factors = {"a": a_factor(config), "b": Factor(("out", "rank"))}
        if config.options.init in ("pissa", "olora"):
            factors["a0"] = Factor(("in", "rank"), trained=False)
            factors["b0"] = Factor(("out", "rank"), trained=False)
        return factors

    @classmethod
    def init(
        cls, key: jax.Array, kernel: jax.Array, rank: int, config: AdapterConfig
    ) -> Arrays:
        """A and B, and for "pissa" and "olora" the same again as "a0" and "b0"."""
        a_shape, b_shape = tall_shapes(kernel, rank)
        kind = config.options.init
        if kind in ("pissa", "olora"):
            a, b = _from_weight(kernel, rank, config)
            return {"a": a, "b": b, "a0": a, "b0": b}
        if kind == "orthogonal":
            return _orthogonal(key, a_shape, b_shape)
        b = jnp.zeros(b_shape, jnp.float32)
        if fixed_a(config) == "projection":
            _, p = orthonormal(key, kernel, rank)
            return {"a": projection(kernel, p), "b": b}
        if kind == "gaussian":
            return {"a": jax.random.normal(key, a_shape) / rank, "b": b}
        bound = 1 / math.sqrt(a_shape[-2])
        a = jax.random.uniform(key, a_shape, jnp.float32, -bound, bound)
        return {"a": a, "b": b}

    def delta(self, x: jax.Array) -> jax.Array:
        """The update s B (Aᵀ x), less the fixed correction where there is one."""
        y = self._times(x, "a", "b")
        # Two products of one form: at initialisation they are equal to the last bit.
        return y - self._times(x, "a0", "b0") if "a0" in self.names else y

    @staticmethod
    def product(arrays: Arrays) -> tuple[jax.Array, jax.Array]:
        """A and B themselves, or [A A₀] and [B −B₀]."""
        a, b = arrays["a"], arrays["b"]
        if "a0" not in arrays:
            return a, b
        a0, b0 = arrays["a0"], arrays["b0"]
        return jnp.concatenate([a, a0], -1), jnp.concatenate([b, -b0], -1)

    def _times(self, x: jax.Array, a: str, b: str) -> jax.Array:
        scaled = self.scale[...][..., None, None] * self.factor(b)
        return wide_product(tall_product(x, self.factor(a)), scaled)


def a_factor(config: AdapterConfig) -> Factor:
    """A is free, or not trained where `fixed_a` fixes it."""
    return Factor(("in", "rank"), trained=fixed_a(config) is None)


def fixed_a(config: AdapterConfig) -> str | None:
    """How A is fixed; None where it is trained, as in methods without that option."""
    return getattr(config.options, "fixed_a", None)


def _from_weight(
    kernel: jax.Array, rank: int, config: AdapterConfig
) -> tuple[jax.Array, jax.Array]:
    if config.options.init == "olora":
        q, r = jnp.linalg.qr(kernel.astype(jnp.float32).mT)
        return r[..., :rank, :].mT, q[..., :rank]
    v, sigma, u = singular_vectors(kernel)
    root = jnp.sqrt(sigma[..., None, :rank] / config.scale(rank))
    return v[..., :rank] * root, u[..., :rank] * root


def _orthogonal(key: jax.Array, a_shape: tuple, b_shape: tuple) -> Arrays:
    *batch, _, rank = a_shape
    keys = jax.random.split(key, 3)
    q, _ = jnp.linalg.qr(jax.random.normal(keys[0], (*batch, rank, rank)))
    return {
        name: jnp.matmul(
            jax.random.normal(k, (*shape[:-1], rank // 2)) / 10,
            half,
            precision="highest",
        )
        for name, k, shape, half in (
            ("a", keys[1], a_shape, q[..., 0::2, :]),
            ("b", keys[2], b_shape, q[..., 1::2, :]),
        )
    }
