"""Soft thresholding of singular values by products only."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from manifold_lora.manifolds.linalg import (
    at_least_float32,
    deviation,
    eye_like,
    inverse_cholesky,
    matmul,
    sym,
    times,
)


def shrink(a: Array, threshold: Any) -> Array:
    """A with every singular value σ replaced by max(σ − λ, 0).

    The result is A minus the nearest matrix of spectral norm at most λ,

        A − Q clip(R),  clip(R) = U · ½(P + λI − |P − λI|),

    for A = QR with orthonormal Q and the polar factors R = UP. Q comes from tall
    products, since AᵀA squares the condition number; U and the sign of P − λI come
    from r×r products. No step divides by a singular value, so A may be of any
    rank, or zero. The result is within about 10ε‖A‖ of the exact one, ε that of
    the dtype, whether σ is above, below or equal to λ: 1e-6 of the largest
    singular value in float32.

    Args:
        a: (…, m, r).
        threshold: λ ≥ 0, a number, a traced scalar, or one number per batch entry.

    Returns:
        The shrunken matrix, of the shape and dtype of a.
    """
    dtype = a.dtype
    (a,) = at_least_float32(a)
    level = jnp.asarray(threshold, a.dtype)[..., None, None]
    scale = jnp.linalg.norm(a, axis=(-2, -1), keepdims=True)
    scale = jnp.where(scale > 0, scale, 1)
    a = a / scale
    # Every λ ≥ ‖A‖ gives zero, and a very large one would lose A to rounding.
    level = jnp.minimum(level / scale, 1)
    q = _basis(a)
    rest = times(q, _clip(matmul(q.mT, a), level))
    return ((a - rest) * scale).astype(dtype)


def _basis(y: Array) -> Array:
    """Orthonormal columns that span the columns of Y, for ‖Y‖ ≤ 1.

    Gram–Schmidt of (1 − δ)YᵀY + δI leaves a singular value 1, brings σ ≫ √δ to 1
    and enlarges the small ones by 1/√δ, of which only those near ε do not converge to
    1. Errors of the Gram matrix stay below δ.
    """
    damping = 1 - 100 * float(jnp.finfo(y.dtype).eps)

    def once(_: Any, y: Array) -> Array:
        return y + times(y, inverse_cholesky(damping * deviation(y)))

    return jax.lax.fori_loop(0, 4, once, y)


def _clip(r: Array, level: Array) -> Array:
    """The square R, ‖R‖ ≤ 1, with singular values min(σ, λ)."""
    eye = eye_like(r)
    u = _unitary(r)
    p = sym(matmul(u.mT, r))
    above = p - level * eye
    size = sym(matmul(_unitary(above), above))  # |P − λI|
    return matmul(u, (p + level * eye - size) / 2)


def _unitary(x: Array) -> Array:
    """The orthogonal polar factor of a square X; of a symmetric one, its sign.

    Scaled Newton–Schulz, X ← ½μX(3I − μ²XᵀX), with the scaling for singular values
    in [ℓ, 1] capped where it would diverge for the largest (Chen & Chow 2014, "A stable
    scaling of Newton–Schulz"). Singular values near ε‖X‖ do not converge to 1.
    """
    eye = eye_like(x)
    norm = jnp.linalg.norm(x, axis=(-2, -1), keepdims=True)
    eps = float(jnp.finfo(x.dtype).eps)

    def iteration(_, carry):
        x, ell = carry
        mu = jnp.minimum(jnp.sqrt(3 / (1 + ell + ell**2)), 1.69770248526)
        x = mu / 2 * matmul(x, 3 * eye - mu**2 * matmul(x.mT, x))
        return x, mu * ell * (3 - (mu * ell) ** 2) / 2

    steps = 42 if x.dtype == jnp.float64 else 22
    start = (x / jnp.where(norm > 0, norm, 1), jnp.asarray(10 * eps, x.dtype))
    return jax.lax.fori_loop(0, steps, iteration, start)[0]
