"""Small-matrix kernels of the geometry: products only, batched, no LAPACK call.

Two reasons for products only: a jitted program with several independent LAPACK
calls can hang on a small CPU, and on a TPU pod products of sharded factors need
no gather. Two reasons for one helper: JAX multiplies float32 in TF32 on NVIDIA
and in bfloat16 on TPU by default, 2e-4 off the manifold instead of 2e-7.
"""

import jax
import jax.numpy as jnp
from jax import Array


def matmul(a: Array, b: Array) -> Array:
    """The product of stacked matrices at full precision on every backend."""
    return jnp.matmul(a, b, precision="highest")


def sym(a: Array) -> Array:
    """The symmetric part (A + Aᵀ)/2."""
    return (a + a.mT) / 2


def at_least_float32(*arrays: Array) -> tuple[Array, ...]:
    """Promote to one common dtype of at least float32, for computing."""
    dtype = jnp.result_type(jnp.float32, *arrays)
    return tuple(a.astype(dtype) for a in arrays)


def gram(a: Array, b: Array) -> Array:
    """AᵀB of two tall matrices, (…, r, r), summed over blocks of 64 rows.

    One running sum over n rows loses ε√n, and a retraction is no more orthonormal
    than the Gram matrix it was made from: 7e-7 against 1e-7 at 384 rows.
    """
    n, r = a.shape[-2:]
    blocks = n // 64
    if blocks < 2:
        return matmul(a.mT, b)
    head, tail = (
        [
            x[..., : blocks * 64, :].reshape(*x.shape[:-2], blocks, 64, r)
            for x in (a, b)
        ],
        [x[..., blocks * 64 :, :] for x in (a, b)],
    )
    total = jnp.sum(matmul(head[0].mT, head[1]), axis=-3)
    return total + matmul(tail[0].mT, tail[1]) if n % 64 else total


def deviation(x: Array) -> Array:
    """XᵀX − I, shape (…, r, r): zero when the columns of X are orthonormal."""
    return gram(x, x) - jnp.eye(x.shape[-1], dtype=x.dtype)


def is_large(e: Array) -> Array:
    """True where ‖E‖ > ½, shape (…, 1, 1): the root of I + E needs a second pass.

    A Gram matrix formed in floating point is wrong by ε‖YᵀY‖, and so is the
    orthonormality after one pass; the second pass starts near the identity.
    """
    return jnp.linalg.norm(e, axis=(-2, -1), keepdims=True) > 0.5


def inverse_root(e: Array) -> Array:
    """(I + E)^(−½) − I of a symmetric E by scaled Newton–Schulz.

    With A = (I + E)/c and Z = I/√c, repeat T = ½μ(3I − μ²A), A ← AT², Z ← ZT.
    Everything is kept as a deviation from the identity (A = I + D, Z = I + F,
    T = I + G), so a small E costs no cancellation and E = 0 gives exactly 0.
    Where E is small c = μ = 1. Elsewhere c bounds the largest eigenvalue, and
    μ is the best scaling for singular values in [ℓ, 1], with ℓ = c^(−½) because
    I + E ≥ I for a tangent step (Chen & Chow 2014, "A stable scaling of
    Newton–Schulz"): seven doublings instead of seventeen at ‖E‖ = 1e6.

    Args:
        e: (…, r, r), symmetric, eigenvalues above −1 and below about 1e7.

    Returns:
        F of the shape of e: I + F is the inverse square root of I + E.
    """
    eye = jnp.eye(e.shape[-1], dtype=e.dtype)
    bound = jnp.linalg.norm(eye + e, axis=(-2, -1), keepdims=True)
    c = jnp.where(is_large(e), jnp.maximum(bound, 1), jnp.ones_like(bound))
    ell = jax.lax.rsqrt(c)
    ell = jnp.where(c == 1, jnp.ones_like(c), ell)
    d = jnp.where(c == 1, e, (eye + e) / c - eye)
    f = (ell - 1) * eye

    def iteration(_, carry):
        d, f, ell = carry
        mu = jnp.sqrt(3 / (1 + ell + ell**2))
        g = ((3 * mu - mu**3) / 2 - 1) * eye - mu**3 / 2 * d
        g_squared = matmul(g, g)
        d = (d + 2 * g) + g_squared + matmul(d, 2 * g + g_squared)
        f = f + g + matmul(f, g)
        ell = jnp.minimum(mu * ell * (3 - (mu * ell) ** 2) / 2, 1)
        return d, f, ell

    steps = 16 if e.dtype == jnp.float64 else 13
    return jax.lax.fori_loop(0, steps, iteration, (d, f, ell))[1]


def inverse_cholesky(e: Array) -> Array:
    """R⁻¹ − I, where I + E = RᵀR with R upper triangular, positive diagonal.

    Gram–Schmidt on the columns w_k of W = R⁻¹ in the inner product of I + E,
    one rank-one update a column on all matrices of the batch at once. Pivots
    are kept above ε times the largest diagonal entry: a later pass with the
    true Gram matrix then corrects them.

    Args:
        e: (…, r, r), symmetric, eigenvalues above −1.

    Returns:
        Upper triangular, of the shape of e; exactly 0 for E = 0.
    """
    r = e.shape[-1]
    index = jnp.arange(r)
    largest = jnp.max(jnp.diagonal(e, axis1=-2, axis2=-1), -1, keepdims=True)
    floor = jnp.finfo(e.dtype).eps * (1 + largest) - 1

    def column(k, carry):
        s, f = carry  # WᵀEW + WᵀW − I and W − I
        row = jax.lax.dynamic_index_in_dim(s, k, -2, keepdims=False)  # (…, r)
        delta = jnp.maximum(jax.lax.dynamic_index_in_dim(row, k, -1), floor)  # (…, 1)
        root = jnp.sqrt(1 + delta)
        later = jnp.where(index > k, row, 0)
        scaled = later / (1 + delta)
        # 1/√(1 + δ) − 1 without cancellation
        u = jnp.where(index == k, -delta / (root * (1 + root)), -scaled)
        w = jax.lax.dynamic_index_in_dim(f, k, -1, keepdims=False)
        w = w + (index == k).astype(e.dtype)
        f = f + w[..., :, None] * u[..., None, :]
        s = s - later[..., :, None] * scaled[..., None, :]
        return s, f

    return jax.lax.fori_loop(0, r, column, (e, jnp.zeros_like(e)))[1]
