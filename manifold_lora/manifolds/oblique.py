"""Matrices with columns of unit length, Ob(n, r) = {X : diag(XᵀX) = 1}.

The simplest manifold with a constraint, and the first to read: `manifold.py` says what
each operation is for, and `stiefel.py` is the same with more algebra.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from manifold_lora.errors import check_choice
from manifold_lora.manifolds.linalg import at_least_float32, bounded
from manifold_lora.manifolds.manifold import Manifold

Retraction = Literal["normalise", "exp"]


@dataclasses.dataclass(frozen=True)
class Oblique(Manifold):
    """Columns of unit length: fixes the scale of the columns, not their angles.

    A product of r spheres, one for each column xⱼ. Choose it where only the
    column norms should be fixed; where columns must also stay orthogonal, and the
    effective rank full, use `Stiefel`. Points are (…, rows, r) of any rows and
    r; the metric is tr uᵀv.

    Args:
        retraction: "normalise", X + v with every column scaled to length 1 (the
            default, second order), with transport by projection; or "exp", great
            circles, with parallel transport along them, which is an isometry.

    Raises:
        InputError: for an unknown retraction.

    References:
        Absil & Gallivan, "Joint diagonalization on the oblique manifold for
        independent component analysis", 2006; Absil, Mahony & Sepulchre,
        "Optimization Algorithms on Matrix Manifolds", 2008, examples 3.5.1, 4.1.1,
        5.4.1 and 8.1.1 (the sphere).

    Examples:
        >>> import jax
        >>> import manifold_lora as ml
        >>> oblique = ml.Oblique()
        >>> x = oblique.random_point(jax.random.key(0), (64, 8))
        >>> v = oblique.random_tangent(jax.random.key(1), x)
        >>> bool(oblique.residual(oblique.retract(x, v)) < 1e-6)
        True
    """

    retraction: Retraction = "normalise"

    def __post_init__(self):
        check_choice("Oblique", "retraction", self.retraction, Retraction)

    def project(self, x: Array, v: Array) -> Array:
        """P(V) = V − X diag(XᵀV): removes the component of every column along xⱼ."""
        dtype = x.dtype
        x, v = at_least_float32(x, v)
        return (v - x * _dot(x, v)).astype(dtype)

    def riemannian_gradient(self, x: Array, g: Array) -> Array:
        """P(G), since the metric is that of the embedding space."""
        return self.project(x, *bounded(g))

    def retract(self, x: Array, v: Array) -> Array:
        """The point reached along v: a point for every finite v.

            normalise    yⱼ/‖yⱼ‖ of yⱼ = xⱼ + vⱼ
            exp          xⱼ cos‖vⱼ‖ + vⱼ sin‖vⱼ‖/‖vⱼ‖

        Drift of a column off its sphere is repaired wherever it moves; where
        vⱼ = 0 it does not change at all. A column with entries above 2³⁰ is scaled down
        to that; the great circle has lost its angle to rounding long before.

        Args:
            x: point, (…, rows, r).
            v: tangent at x, of the same shape.

        Returns:
            The point reached, of the shape and dtype of x.
        """
        dtype = x.dtype
        x, v = at_least_float32(x, v)
        (v,) = bounded(v, axis=-2)
        moved = jnp.any(v != 0, axis=-2, keepdims=True)
        if self.retraction == "normalise":
            y = x + v
        else:
            # √ has no derivative at 0, and sinc(θ/π) = sin θ/θ has all of them.
            theta = jnp.where(moved, jnp.sqrt(jnp.where(moved, _dot(v, v), 1)), 0)
            y = x * jnp.cos(theta) + v * jnp.sinc(theta / jnp.pi)
        # The rounding of a long v may cancel x.
        square = _dot(y, y)
        lost = square == 0
        size = jnp.sqrt(jnp.where(moved & ~lost, square, 1))
        return (jnp.where(lost, x, y) / size).astype(dtype)

    def step(self, xs: Sequence[Array], ds: Sequence[Array]) -> list[Array]:
        """R(x, P_x(d)) of several points."""
        return super().step(xs, [bounded(d, axis=-2)[0] for d in ds])

    def transport(self, x: Array, y: Array, v: Array) -> Array:
        """P_y(v), or by "exp" parallel transport along the shorter great circle.

        That is vⱼ − (yⱼᵀvⱼ)/(1 + xⱼᵀyⱼ) wⱼ of w = x + y. As 1 + xⱼᵀyⱼ = ½‖wⱼ‖² it is
        a reflection, an isometry up to yⱼ = −xⱼ, where it does not change vⱼ.
        """
        if self.retraction == "normalise":
            return self.project(y, v)
        dtype = x.dtype
        x, y, v = at_least_float32(x, y, v)
        w = x + y
        square = _dot(w, w)
        half = jnp.where(square > 0, square, 1) / 2
        return (v - w * (_dot(w, v) / half)).astype(dtype)

    def inner(self, x: Array, u: Array, v: Array) -> Array:
        """The metric tr uᵀv."""
        _, u, v = at_least_float32(x, u, v)
        return jnp.sum(u * v, axis=(-2, -1))

    def random_point(
        self, key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32
    ) -> Array:
        """Columns independent and uniform on the sphere: normalised normal vectors."""
        self.check_shape(shape)
        y = jax.random.normal(key, shape, jnp.promote_types(dtype, jnp.float32))
        return self.nearest_point(y).astype(dtype)

    def nearest_point(self, y: Array) -> Array:
        """yⱼ/‖yⱼ‖: repairs a drifted point. No column of Y may be zero."""
        dtype = y.dtype
        (y,) = at_least_float32(y)
        return (y / jnp.sqrt(_dot(y, y))).astype(dtype)

    def penalty_gradient(self, x: Array) -> Array:
        """X diag(diag(XᵀX) − 1), the gradient of ¼Σ(‖xⱼ‖² − 1)², for `landing`."""
        dtype = x.dtype
        (x,) = at_least_float32(x)
        return (x * (_dot(x, x) - 1)).astype(dtype)

    def residual(self, x: Array) -> Array:
        """The constraint violation max |‖xⱼ‖² − 1|, at least float32, of shape (…)."""
        (x,) = at_least_float32(x)
        return jnp.max(jnp.abs(_dot(x, x) - 1), axis=(-2, -1))


def _dot(a: Array, b: Array) -> Array:
    """aⱼᵀbⱼ of every column, of shape (…, 1, r)."""
    return jnp.sum(a * b, axis=-2, keepdims=True)
