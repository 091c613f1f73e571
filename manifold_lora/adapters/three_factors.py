"""ΔW = s U S Vᵀ: what StelLA and LoRAM-FR share."""

import jax
import jax.numpy as jnp
from flax import nnx

from manifold_lora.adapters.low_rank import Arrays, LowRankLinear
from manifold_lora.adapters.products import tall_product, wide_product


class ThreeFactorLinear(LowRankLinear):
    """y = W x + s U S (Vᵀ x), with U (out, r), V (in, r) and S (r, r) or its diagonal.

    Exported as plain LoRA with B = U S and A = V, exactly.
    """

    s: nnx.LoRAParam

    def delta(self, x: jax.Array) -> jax.Array:
        """The update s U S (Vᵀ x)."""
        scale = self.scale[...][..., None, None]
        u, s, v = map(self.factor, "usv")
        y = tall_product(x, v)
        y = y * s.astype(x.dtype) if s.ndim < u.ndim else wide_product(y, s)
        return wide_product(y, scale * u)

    @staticmethod
    def product(arrays: Arrays) -> tuple[jax.Array, jax.Array]:
        """V and U S."""
        u, s, v = (arrays[name] for name in "usv")
        if s.ndim < u.ndim:
            return v, u * s[..., None, :]
        return v, jnp.matmul(u, s, precision="highest")
