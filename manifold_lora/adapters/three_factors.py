"""ΔW = s U S Vᵀ: what StelLA and LoRAM-FR share."""

import jax
import jax.numpy as jnp
from flax import nnx

from manifold_lora.adapters.low_rank import LowRankLinear


class ThreeFactorLinear(LowRankLinear):
    """y = W x + s U S (Vᵀ x), with U (out, r), V (in, r) and S (r, r) or its diagonal.

    Exported as plain LoRA with B = U S and A = V, exactly.
    """

    s: nnx.LoRAParam

    def delta(self, x: jax.Array) -> jax.Array:
        """S U S (Vᵀ x)."""
        u, s, v = (w.astype(x.dtype) for w in self._scaled())
        y = x @ v
        return (y * s if s.ndim < u.ndim else y @ s.mT) @ u.mT

    def pair(self) -> tuple[jax.Array, jax.Array]:
        """V and U S."""
        u, s = self.outputs("u"), self.s[...]
        if s.ndim < u.ndim:
            return self.inputs("v"), u * s[..., None, :]
        return self.inputs("v"), jnp.matmul(u, s, precision="highest")

    def _scaled(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """S·U, S and V in float32."""
        scale = self.scale[...][..., None, None]
        return scale * self.outputs("u"), self.s[...], self.inputs("v")
