"""ΔW = s U S Vᵀ: what StelLA and LoRAM-FR share."""

import jax
import jax.numpy as jnp
from flax import nnx

from manifold_lora.adapters.low_rank import Arrays, LowRankLinear


class ThreeFactorLinear(LowRankLinear):
    """y = W x + s U S (Vᵀ x), with U (out, r), V (in, r) and S (r, r) or its diagonal.

    Exported as plain LoRA with B = U S and A = V, exactly.
    """

    s: nnx.LoRAParam

    def delta(self, x: jax.Array) -> jax.Array:
        """The update s U S (Vᵀ x)."""
        scale = self.scale[...][..., None, None]
        u, s, v = map(self.factor, "usv")
        u, s, v = (w.astype(x.dtype) for w in (scale * u, s, v))
        y = x @ v
        return (y * s if s.ndim < u.ndim else y @ s.mT) @ u.mT

    @staticmethod
    def product(arrays: Arrays) -> tuple[jax.Array, jax.Array]:
        """V and U S."""
        u, s, v = (arrays[name] for name in "usv")
        if s.ndim < u.ndim:
            return v, u * s[..., None, :]
        return v, jnp.matmul(u, s, precision="highest")
