"""LoRA: ΔW = s B Aᵀ with both factors free."""

import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from manifold_lora.errors import InputError
from manifold_lora.manifolds import Euclidean, Manifold
from manifold_lora.models import Linear


class LoRALinear(nnx.Module):
    """A frozen linear layer and a trained low-rank update, y = W x + s B (Aᵀ x).

    Both factors are tall and float32: `a` is ((layers,) in, r) and `b` is
    ((layers,) out, r), so ΔW = s B Aᵀ is (out, in) as in the papers. The product is
    computed in the dtype of x. B starts at zero, A uniform on ±1/√in as in PEFT, so
    that the model starts as its base, bit for bit.

    A method with two factors is a subclass: its manifolds and its `start`.

    References:
        Hu et al., "LoRA", 2021, arXiv:2106.09685; Kalajdzievski, "Rank-stabilized
        LoRA", 2023, arXiv:2312.03732, for the scale alpha/√r.
    """

    manifolds: ClassVar[dict[str, Manifold]] = {"a": Euclidean(), "b": Euclidean()}

    def __init__(
        self,
        base: Linear,
        *,
        rank: int,
        alpha: float,
        rslora: bool = False,
        dropout: float = 0.0,
        key: jax.Array,
    ):
        limit = min(base.in_features, base.out_features)
        if not 1 <= rank <= limit:
            raise InputError(
                f"rank {rank} does not fit a layer of {base.in_features} inputs and "
                f"{base.out_features} outputs: it may be 1 to {limit}. Lower --rank, "
                "or give this module its own in --rank-pattern."
            )
        self.base = base
        self.rank = rank
        self.alpha = alpha
        self.rslora = rslora
        self.dropout = dropout
        batch = base.kernel.shape[:-2]
        # Compiled once a shape: the loops inside a random point compile at every call.
        a, b = jax.jit(self.start, static_argnums=(1, 2))(
            key, (*batch, base.in_features, rank), (*batch, base.out_features, rank)
        )
        # The tag beside the factor is all that the optimiser needs to know.
        self.a = nnx.LoRAParam(a, manifold=self.manifolds["a"])
        self.b = nnx.LoRAParam(b, manifold=self.manifolds["b"])

    @staticmethod
    def start(
        key: jax.Array, a_shape: tuple[int, ...], b_shape: tuple[int, ...]
    ) -> tuple[jax.Array, jax.Array]:
        """The factors before the first step."""
        bound = 1 / math.sqrt(a_shape[-2])
        a = jax.random.uniform(key, a_shape, jnp.float32, -bound, bound)
        return a, jnp.zeros(b_shape, jnp.float32)

    @property
    def scale(self) -> float:
        """The s of ΔW = s B Aᵀ: alpha/r, or alpha/√r with `rslora`."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Shapes (…, in) to (…, out); `key` switches dropout on."""
        y = self.base(x)
        if key is not None and self.dropout > 0:
            keep = jax.random.bernoulli(key, 1 - self.dropout, x.shape)
            x = jnp.where(keep, x / (1 - self.dropout), 0)
        a = self.a[...].astype(x.dtype)
        b = (self.scale * self.b[...]).astype(x.dtype)
        return y + (x @ a) @ b.mT

    def weight(self) -> jax.Array:
        """ΔW in float32, laid out as the kernel: ((layers,) in, out)."""
        product = jnp.matmul(self.a[...], self.b[...].mT, precision="highest")
        return self.scale * product

    def fuse(self) -> Linear:
        """The plain layer with W + ΔW, summed in float32 and rounded once."""
        kernel = self.base.kernel
        fused = kernel[...].astype(jnp.float32) + self.weight()
        kernel.set_value(fused.astype(kernel.dtype))
        return self.base
