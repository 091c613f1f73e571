"""LoRA: ΔW = s B Aᵀ with both factors free."""

import math

import jax
import jax.numpy as jnp
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

    a: nnx.Variable
    b: nnx.LoRAParam

    @staticmethod
    def factors(config: AdapterConfig) -> dict[str, Factor]:
        """A and B are free, A unless it is fixed; A₀ and B₀ are not trained."""
        factors = {"a": a_factor(config), "b": Factor(("out", "rank"))}
        if config.init in ("pissa", "olora"):
            factors["a0"] = Factor(("in", "rank"), trained=False)
            factors["b0"] = Factor(("out", "rank"), trained=False)
        return factors

    @staticmethod
    def init(
        key: jax.Array, kernel: jax.Array, rank: int, config: AdapterConfig
    ) -> Arrays:
        """A and B, and for "pissa" and "olora" the same again as "a0" and "b0"."""
        a_shape, b_shape = tall_shapes(kernel, rank)
        kind = config.init
        if kind in ("pissa", "olora"):
            a, b = _from_weight(kernel, rank, config)
            return {"a": a, "b": b, "a0": a, "b0": b}
        if kind == "orthogonal":
            return _orthogonal(key, a_shape, b_shape)
        b = jnp.zeros(b_shape, jnp.float32)
        if config.fixed_a == "projection":
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
        return (x @ self.factor(a).astype(x.dtype)) @ scaled.astype(x.dtype).mT


def a_factor(config: AdapterConfig) -> Factor:
    """A is free, or not trained where `fixed_a` fixes it."""
    return Factor(("in", "rank"), trained=config.fixed_a is None)


def _from_weight(
    kernel: jax.Array, rank: int, config: AdapterConfig
) -> tuple[jax.Array, jax.Array]:
    if config.init == "olora":
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
