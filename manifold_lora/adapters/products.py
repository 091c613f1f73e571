"""Products of activations with tall factors, and their gradients.

The gradient Xᵀ G of a tall factor W (n, r), with X (tokens, n) and G (tokens, r), is
computed as (Gᵀ X)ᵀ. Written as Xᵀ G, XLA transposes the large X in memory, together
with what X is computed from, where this one transposes the small G.
"""

import jax

from manifold_lora.models.precision import matmul


def sum_over_tokens(x: jax.Array, g: jax.Array) -> jax.Array:
    """Xᵀ G over all leading axes: (…, n) and (…, r) to (n, r), at least float32."""
    x, g = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    # Without the barrier, XLA would turn the product into Xᵀ G again.
    return jax.lax.optimization_barrier(matmul(g.T, x)).T


@jax.custom_vjp
def tall_product(x: jax.Array, w: jax.Array) -> jax.Array:
    """X W with a tall W: (…, n) and (n, r) to (…, r).

    W is rounded to the dtype of x for the product; its gradient is not.

    >>> tall_product(jax.numpy.ones((2, 5, 8)), jax.numpy.ones((8, 3))).shape
    (2, 5, 3)
    """
    return _product(x, w)


@jax.custom_vjp
def wide_product(x: jax.Array, w: jax.Array) -> jax.Array:
    """X Wᵀ with a tall W: (…, r) and (n, r) to (…, n); see `tall_product`.

    >>> wide_product(jax.numpy.ones((2, 5, 3)), jax.numpy.ones((8, 3))).shape
    (2, 5, 8)
    """
    return _product(x, w.mT)


def _product(x: jax.Array, w: jax.Array) -> jax.Array:
    return matmul(x, w.astype(x.dtype)).astype(x.dtype)


def _tall_backward(saved: tuple, dy: jax.Array) -> tuple:
    x, w = saved
    return _product(dy, w.mT), sum_over_tokens(x, dy).astype(w.dtype)


def _wide_backward(saved: tuple, dy: jax.Array) -> tuple:
    x, w = saved
    return _product(dy, w), sum_over_tokens(dy, x).astype(w.dtype)


tall_product.defvjp(lambda x, w: (_product(x, w), (x, w)), _tall_backward)
wide_product.defvjp(lambda x, w: (_product(x, w.mT), (x, w)), _wide_backward)
