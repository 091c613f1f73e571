"""Matrices with orthonormal columns, St(n, r) = {X : XᵀX = I}."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array

from manifold_lora.errors import InputError, nearest
from manifold_lora.manifolds.linalg import (
    at_least_float32,
    deviation,
    gram,
    inverse_cholesky,
    inverse_root,
    is_large,
    matmul,
    sym,
)
from manifold_lora.manifolds.manifold import Manifold

Retraction = Literal["polar", "qr"]
Metric = Literal["canonical", "euclidean"]

# The inverse factor of a Gram matrix YᵀY = I + E, less the identity.
_FACTOR = {"polar": inverse_root, "qr": inverse_cholesky}


@dataclasses.dataclass(frozen=True)
class Stiefel(Manifold):
    """Orthonormal columns: for factors that must keep their full effective rank.

    The tangent space at X is {Z : XᵀZ + ZᵀX = 0}. Points are tall,
    (…, rows, r) with rows ≥ r, orthonormal in columns; rows = r gives the
    orthogonal group and r = 1 the sphere. For columns of unit length that need
    not be orthogonal use the oblique manifold instead.

    Args:
        retraction: "polar", X + v to the nearest orthonormal matrix, second order
            (the default); or "qr", Gram–Schmidt from the first column on, first
            order and the one of Stiefel-LoRA.
        metric: "canonical", tr uᵀ(I − ½XXᵀ)v (the default, StelLA's); or
            "euclidean", tr uᵀv.

    Raises:
        InputError: for an unknown retraction or metric.

    References:
        Edelman, Arias & Smith, "The geometry of algorithms with orthogonality
        constraints", 1998; Absil, Mahony & Sepulchre, "Optimization Algorithms
        on Matrix Manifolds", 2008, examples 3.6.2 and 4.1.3.

    Examples:
        >>> import jax
        >>> import manifold_lora as ml
        >>> stiefel = ml.Stiefel()
        >>> x = stiefel.random_point(jax.random.key(0), (4, 64, 8))
        >>> v = stiefel.random_tangent(jax.random.key(1), x)
        >>> bool((stiefel.residual(stiefel.retract(x, v)) < 1e-6).all())
        True
    """

    retraction: Retraction = "polar"
    metric: Metric = "canonical"

    def __post_init__(self):
        for field, known in (("retraction", Retraction), ("metric", Metric)):
            value = getattr(self, field)
            if value not in get_args(known):
                hint = nearest(str(value), get_args(known))
                raise InputError(f"Stiefel has no {field} {value!r}. {hint}")

    def project(self, x: Array, v: Array) -> Array:
        """P(V) = V − X sym(XᵀV), orthogonal in the embedding for both metrics."""
        dtype = x.dtype
        x, v = at_least_float32(x, v)
        return (v - matmul(x, sym(matmul(x.mT, v)))).astype(dtype)

    def riemannian_gradient(self, x: Array, g: Array) -> Array:
        """G − X GᵀX in the canonical metric, G − X sym(XᵀG) in the Euclidean."""
        if self.metric == "euclidean":
            return self.project(x, g)
        dtype = x.dtype
        x, g = at_least_float32(x, g)
        return (g - matmul(x, matmul(g.mT, x))).astype(dtype)

    def retract(self, x: Array, v: Array) -> Array:
        """Y (YᵀY)^(−½) or Y R⁻¹ of Y = X + v, right for ‖v‖₂ from 0 to 1e3.

        With YᵀY = I + E and I + F its inverse factor, the result is formed as
        X + (v + YF): a small step is then as accurate as the sum itself. E holds
        XᵀX − I, so that drift is repaired, but not for v = 0: R(X, 0) = X exactly.
        Where the step is large the Gram matrix loses ε‖v‖², and a pass on the true
        Gram matrix of the result mends it.

        Args:
            x: point, (…, rows, r).
            v: tangent at x, of the same shape.

        Returns:
            The point reached, of the shape and dtype of x.
        """
        dtype = x.dtype
        x, v = at_least_float32(x, v)
        factor = _FACTOR[self.retraction]
        e = 2 * sym(gram(x, v)) + gram(v, v)
        moved = jnp.any(v != 0, axis=(-2, -1), keepdims=True)
        e = e + jnp.where(moved, deviation(x), 0)
        y = x + (v + matmul(x + v, factor(e)))
        f = jnp.where(is_large(e), factor(deviation(y)), 0)
        y = y + matmul(y, f)
        return y.astype(dtype)

    def transport(self, x: Array, y: Array, v: Array) -> Array:
        """Vector transport by projection, P_Y(v): never longer than v."""
        del x
        return self.project(y, v)

    def inner(self, x: Array, u: Array, v: Array) -> Array:
        """Tr uᵀ(I − ½XXᵀ)v in the canonical metric, tr uᵀv in the Euclidean."""
        x, u, v = at_least_float32(x, u, v)
        product = jnp.sum(u * v, axis=(-2, -1))
        if self.metric == "euclidean":
            return product
        normal = matmul(x.mT, u) * matmul(x.mT, v)
        return product - jnp.sum(normal, axis=(-2, -1)) / 2

    def random_point(
        self, key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32
    ) -> Array:
        """Uniform (Haar) on the manifold: the QR factor of a normal matrix."""
        self.check_shape(shape)
        y = jax.random.normal(key, shape, jnp.promote_types(dtype, jnp.float32))
        # Self-correcting: a square normal matrix needs four passes.
        y = _repeat(4, inverse_cholesky, y)
        return y.astype(dtype)

    def nearest_point(self, y: Array) -> Array:
        """Y (YᵀY)^(−½), the orthonormal matrix nearest to Y: repairs a drifted point.

        Y must have full column rank and a condition number below about 1e3 in
        float32.
        """
        dtype = y.dtype
        (y,) = at_least_float32(y)
        y = y / jnp.linalg.norm(y, axis=(-2, -1), keepdims=True)
        # Each pass grows the small singular values, the last ones polish.
        return _repeat(3, inverse_root, y).astype(dtype)

    def residual(self, x: Array) -> Array:
        """Max |XᵀX − I|, in at least float32, of shape (…)."""
        (x,) = at_least_float32(x)
        return jnp.max(jnp.abs(deviation(x)), axis=(-2, -1))

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Points need rows ≥ columns."""
        super().check_shape(shape)
        if shape[-2] < shape[-1]:
            raise InputError(
                f"{self} needs rows ≥ columns, got shape {shape}: {shape[-1]} columns "
                f"of length {shape[-2]} cannot be orthonormal. Transpose the factor "
                "or lower the rank."
            )


def _repeat(passes: int, factor: Callable[[Array], Array], y: Array) -> Array:
    """Orthonormalise Y by the inverse factor of its Gram matrix, several times."""

    def once(_: Any, y: Array) -> Array:
        return y + matmul(y, factor(deviation(y)))

    return jax.lax.fori_loop(0, passes, once, y)
