"""Initial factors: random ones, and singular vectors of the weight."""

from functools import partial

import jax
import jax.numpy as jnp

from manifold_lora.manifolds import Manifold, Stiefel


@partial(jax.jit, static_argnums=(0, 2))
def random_point(manifold: Manifold, key: jax.Array, shape: tuple[int, ...]):
    """A random point, compiled once per shape: eager, its loops compile every time."""
    return manifold.random_point(key, shape)


def tall_shapes(kernel: jax.Array, rank: int) -> tuple[tuple[int, ...], ...]:
    """The shapes of A and B beside a kernel ((layers,) in, out)."""
    *batch, n, m = kernel.shape
    return (*batch, n, rank), (*batch, m, rank)


def projection(kernel: jax.Array, p: jax.Array) -> jax.Array:
    """Wᵀ P in float32, from the kernel Wᵀ ((layers,) in, out)."""
    return jnp.matmul(kernel.astype(jnp.float32), p, precision="highest")


def orthonormal(key: jax.Array, kernel: jax.Array, rank: int) -> tuple:
    """Uniform orthonormal V ((layers,) in, r) and U ((layers,) out, r)."""
    keys = jax.random.split(key)
    shapes = tall_shapes(kernel, rank)
    v, u = (random_point(Stiefel(), k, s) for k, s in zip(keys, shapes, strict=True))
    return v, u


def singular_vectors(kernel: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """V, σ and U of W = U diag(σ) Vᵀ, largest first, from the kernel Wᵀ.

    By LAPACK, outside of any compiled program: a minute for a matrix of 4096 × 14336.
    """
    v, sigma, ut = jnp.linalg.svd(kernel.astype(jnp.float32), full_matrices=False)
    return v, sigma, ut.mT
