"""Vector transports of the Stiefel manifold by differentiated retractions.

The derivative of ξ ↦ R(X, η + tξ) at t = 0, where R(X, η) = Y. The step η is not
an argument: it follows from X and Y, in r×r matrices.
"""

import jax
import jax.numpy as jnp
from jax import Array

from manifold_lora.manifolds.linalg import (
    eye_like,
    inverse,
    lyapunov,
    matmul,
    times,
)


def _polar(x: Array, y: Array, v: Array) -> Array:
    """YΛ + (I − YYᵀ)ξH⁻¹, where X + η = YH and HΛ + ΛH = Yᵀξ − ξᵀY.

    H is symmetric with sym(XᵀYH) = I, because Xᵀη is skew.
    """
    s = matmul(x.mT, y)
    h = lyapunov(s, 2 * eye_like(s))
    w = matmul(y.mT, v)
    inside = lyapunov(h, w - w.mT)
    b = inverse(h)
    return times(y, inside - matmul(w, b)) + times(v, b)


def _qr(x: Array, y: Array, v: Array) -> Array:
    """Yρ(YᵀξR⁻¹) + (I − YYᵀ)ξR⁻¹, where X + η = YR, ρ(M) = tril(M,−1) − tril(M,−1)ᵀ."""
    b = inverse(_triangle(matmul(x.mT, y)))
    w = matmul(matmul(y.mT, v), b)
    lower = jnp.tril(w, -1)
    return times(y, lower - lower.mT - w) + times(v, b)


def _triangle(m: Array) -> Array:
    """The upper triangular R with sym(MR) = I, column by column.

    Column k solves the leading block: (MR)ᵢₖ = −(MR)ₖᵢ for i < k, and (MR)ₖₖ = 1.
    """
    r = m.shape[-1]
    index = jnp.arange(r)
    eye = eye_like(m)

    def column(k, triangle):
        inside = index <= k
        leading = jnp.where(inside[:, None] & inside, m, eye)
        row = jnp.sum(jnp.where((index == k)[:, None], matmul(m, triangle), 0), -2)
        right = jnp.where(index < k, -row, (index == k).astype(m.dtype))
        new = matmul(inverse(leading), right[..., None])
        return triangle + new * (index == k)

    return jax.lax.fori_loop(0, r, column, jnp.zeros_like(m))


DIFFERENTIATED = {"polar": _polar, "qr": _qr}
