"""The diagonal scaling D₁ W D₂ + ΔW around another adapter."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from manifold_lora.adapters.low_rank import LowRankLinear
from manifold_lora.manifolds import Euclidean
from manifold_lora.models import Linear


class ScaledLinear(nnx.Module):
    """y = D₁ W D₂ x + ΔW x, with trained diagonals, I at first.

    LoRAM proposes it for any method. D₁ and D₂ are vectors "d1" ((layers,) out) and
    "d2" ((layers,) in) beside the wrapped adapter, and free. The result is not W plus
    a matrix of low rank: it can be merged, but PEFT has no form for it.

    References:
        Jiang, Wang & Stich, "LoRAM", 2025, "Diagonal scaling".
    """

    def __init__(self, adapter: LowRankLinear):
        self.adapter = adapter
        *batch, n, m = adapter.base.shape
        layers = ("layers",) * len(batch)
        inputs, outputs = adapter.base.axes
        self.d1 = nnx.LoRAParam(
            jnp.ones((*batch, m)), manifold=Euclidean(), axes=(*layers, outputs)
        )
        self.d2 = nnx.LoRAParam(
            jnp.ones((*batch, n)), manifold=Euclidean(), axes=(*layers, inputs)
        )

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Shapes (…, in) to (…, out); `key` switches dropout of ΔW on."""
        base, (d1, d2) = self.adapter.base, self.diagonals()
        y = base(d2.astype(x.dtype) * x)
        bias = 0 if base.bias is None else base.bias[...]
        y = d1.astype(x.dtype) * (y - bias) + bias
        return y + self.adapter.delta(self.adapter.dropped(x, key))

    def merge(self) -> Linear:
        """The plain layer with D₁ W D₂ + ΔW, in float32 and rounded once."""

        def merged(kernel: jax.Array, delta: jax.Array, d1: Any, d2: Any) -> jax.Array:
            scaled = d2[..., None] * kernel.astype(jnp.float32)
            return scaled * d1[..., None, :] + delta

        base, delta = self.adapter.base, self.adapter.weight()
        return base.with_kernel(base.map_kernel(merged, delta, *self.diagonals()))

    def diagonals(self) -> tuple[jax.Array, jax.Array]:
        """D₁ and D₂, which are I in a layer that is not adapted."""
        adapted = self.adapter.scale[...][..., None] > 0
        return jnp.where(adapted, self.d1[...], 1), jnp.where(adapted, self.d2[...], 1)
