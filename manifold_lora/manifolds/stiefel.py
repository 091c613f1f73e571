"""Matrices with orthonormal columns, St(n, r) = {X : XᵀX = I}."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from manifold_lora.errors import InputError, check_choice
from manifold_lora.manifolds import transports
from manifold_lora.manifolds.linalg import (
    at_least_float32,
    bounded,
    deviation,
    expm,
    eye_like,
    finite_products,
    inverse,
    inverse_cholesky,
    inverse_root,
    matmul,
    shortening,
    sym,
    times,
)
from manifold_lora.manifolds.manifold import Manifold
from manifold_lora.manifolds.orthonormal import (
    longest,
    orthonormalise,
    polish,
    small_products,
)

Retraction = Literal["polar", "qr", "cayley", "exp"]
Metric = Literal["canonical", "euclidean"]
VectorTransport = Literal["projection", "differentiated"]

# Of "exp": in float32 the exponential has lost its digits at some thousand radians.
_LONGEST_ANGLE = 1536.0


@dataclasses.dataclass(frozen=True)
class Stiefel(Manifold):
    """Orthonormal columns: for factors that must keep their full effective rank.

    The tangent space at X is {Z : XᵀZ + ZᵀX = 0}. Points are tall,
    (…, rows, r) with rows ≥ r, orthonormal in columns; rows = r gives the
    orthogonal group and r = 1 the sphere. For columns of unit length that need
    not be orthogonal use the oblique manifold instead.

    Args:
        retraction: "polar", X + v to the nearest orthonormal matrix (the default);
            "qr", Gram–Schmidt from the first column on, as in Stiefel-LoRA;
            "cayley"; or "exp", the geodesic of the metric. Polar is second order in
            the Euclidean metric, Cayley in the canonical one, and both are first
            order in the other; QR is first order.
        metric: "canonical", tr uᵀ(I − ½XXᵀ)v (the default, StelLA's); or
            "euclidean", tr uᵀv.
        vector_transport: "projection" (the default), which is non-expansive; or
            "differentiated", the derivative of the retraction, for "polar" and
            "qr". It costs a few more r×r inverses.

    Raises:
        InputError: for an unknown retraction, metric or vector transport, or a
            differentiated transport of another retraction.

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
    vector_transport: VectorTransport = "projection"

    def __post_init__(self):
        check_choice("Stiefel", "retraction", self.retraction, Retraction)
        check_choice("Stiefel", "metric", self.metric, Metric)
        check_choice(
            "Stiefel", "vector_transport", self.vector_transport, VectorTransport
        )
        if (
            self.vector_transport == "differentiated"
            and self.retraction not in transports.DIFFERENTIATED
        ):
            raise InputError(
                f"Stiefel has no differentiated transport of {self.retraction!r}. "
                f"Use one of {', '.join(transports.DIFFERENTIATED)}, or "
                'vector_transport="projection".'
            )

    def project(self, x: Array, v: Array) -> Array:
        """P(V) = V − X sym(XᵀV), orthogonal in the embedding for both metrics."""
        dtype = x.dtype
        x, v = at_least_float32(x, v)
        return (v - times(x, sym(matmul(x.mT, v)))).astype(dtype)

    def riemannian_gradient(self, x: Array, g: Array) -> Array:
        """G − X GᵀX in the canonical metric, G − X sym(XᵀG) in the Euclidean."""
        if self.metric == "euclidean":
            return self.project(x, *bounded(g))
        dtype = x.dtype
        x, g = at_least_float32(x, g)
        (w,), (c,) = finite_products(lambda gs: [matmul(gs[0].mT, x)], [g])
        return (c * g - times(x, w)).astype(dtype)

    def retract(self, x: Array, v: Array) -> Array:
        """The point reached along v: a point for every finite v.

            polar    Y (YᵀY)^(−½) of Y = X + v
            qr       Y R⁻¹ of Y = X + v = QR, R upper with positive diagonal
            cayley   X + (v − ½XN)(I − ½A + ¼N)⁻¹
            exp      the geodesic of the metric, by exponentials of 2r×2r matrices

        with A = Xᵀv and N = v⊥ᵀv⊥ of v⊥ = v − XA. A small step is as accurate as
        the sum x + u itself, and drift of X off the manifold is repaired, except
        for v = 0: R(X, 0) = X exactly. The distance to the exact point is below 1e-6 in
        float32 up to ‖v‖₂ = 10 for polar, QR and Cayley (exp: 1e-5), and for polar
        5e-5 at 100.

        Where float32 ends v is shortened, in its direction: scaled by min(1, c/β,
        2³⁰/max |v|), where β² = max_i Σ_j |vᵀv|_ij bounds ‖v‖₂ ≤ β ≤ r^½ ‖v‖₂, and
        c = 512 (4096 in float64), or 1536 radians for "exp". Shorter steps are not
        touched. As v grows polar, QR and Cayley tend to a limit, from which c = 512
        is some 1/c away.

        Args:
            x: point, (…, rows, r).
            v: tangent at x, of the same shape.

        Returns:
            The point reached, of the shape and dtype of x.
        """
        dtype = x.dtype
        x, v = at_least_float32(x, v)
        if self.retraction == "polar" or self.retraction == "qr":
            (w,), (gram,), (c,), scales = small_products([x], [v])
            e = 2 * sym(w) + gram
            zero, scale = jnp.zeros_like(e), c * eye_like(e)
            (y,), _ = orthonormalise(
                self.retraction, [x], [zero], [v], [scale], [e], [gram], scales
            )
        else:
            u = self._cayley(x, v) if self.retraction == "cayley" else self._exp(x, v)
            y = x + u
            moved = jnp.any(v != 0, axis=(-2, -1), keepdims=True)
            y = y + times(y, polish(jnp.where(moved, deviation(y), 0)))
        return y.astype(dtype)

    def _cayley(self, x: Array, v: Array) -> Array:
        (v,) = bounded(v)
        a = matmul(x.mT, v)
        normal = v - times(x, a)
        n = matmul(normal.mT, normal)
        c = shortening(matmul(a.mT, a) + n, longest(x.dtype))
        a, n = c * a, c**2 * n
        b = inverse(eye_like(a) - a / 2 + n / 4)
        return times(v, c * b) - times(x, matmul(n, b) / 2)

    def _exp(self, x: Array, v: Array) -> Array:
        """X⁺ − X; scaling the lower blocks by τ = ‖·‖^½ balances the norms.

        The result does not depend on τ, which is therefore a constant: its own
        derivative is infinite at v = 0.
        """
        (v,) = bounded(v)
        a = matmul(x.mT, v)
        eye = eye_like(a)
        canonical = self.metric == "canonical"
        w = v - times(x, a) if canonical else v
        n = matmul(w.mT, w)
        c = shortening(matmul(a.mT, a) + n if canonical else n, _LONGEST_ANGLE)
        a, n = c * a, c**2 * n
        if canonical:  # [X v⊥] exp([[A, −N], [I, 0]]) [I; 0]
            last, turn = jnp.zeros_like(a), eye
        else:  # [X v] exp([[A, −vᵀv], [I, A]]) [I; 0] exp(−A)
            last, turn = a, expm(-a)
        size = jnp.linalg.norm(jax.lax.stop_gradient(n), axis=(-2, -1), keepdims=True)
        tau = jnp.sqrt(size)
        tau = jnp.where(tau > 0, tau, 1)
        e = expm(jnp.block([[a, -n / tau], [tau * eye, last]]))
        r = a.shape[-1]
        upper, lower = matmul(e[..., :r, :r], turn), matmul(e[..., r:, :r], turn)
        return times(x, upper - eye) + times(w, c * (lower / tau))

    def step(self, xs: Sequence[Array], ds: Sequence[Array]) -> list[Array]:
        """R(x, P_x(d)) of several points: reads d twice, all else is r×r.

        With W = Xᵀd and Z = sym(W) the projection is v = d − XZ, so that
        Y = X(I − Z) + d has the Gram matrix I + dᵀd − 2 sym(ZW) + Z².
        """
        if self.retraction not in ("polar", "qr"):
            bounds = [bounded(*at_least_float32(d))[0] for d in ds]
            grams = [matmul(d.mT, d) for d in bounds]
            cs = [shortening(g, _LONGEST_ANGLE) for g in grams]
            return super().step(xs, [c * d for c, d in zip(cs, bounds, strict=True)])
        dtypes = [x.dtype for x in xs]
        pairs = [at_least_float32(x, d) for x, d in zip(xs, ds, strict=True)]
        wide = [x for x, _ in pairs]
        ds = [d for _, d in pairs]
        ws, grams, cs, bounds = small_products(wide, ds)
        zs = [sym(w) for w in ws]
        es = [
            g - 2 * sym(matmul(z, w)) + matmul(z, z)
            for g, z, w in zip(grams, zs, ws, strict=True)
        ]
        scales = [c * eye_like(z) for c, z in zip(cs, zs, strict=True)]
        shifts = [-z for z in zs]
        points, _ = orthonormalise(
            self.retraction, wide, shifts, ds, scales, es, grams, bounds
        )
        return [y.astype(dtype) for y, dtype in zip(points, dtypes, strict=True)]

    def transport(self, x: Array, y: Array, v: Array) -> Array:
        """P_y(v), or the derivative of R(x, ·) where it reaches y, applied to v."""
        if self.vector_transport == "projection":
            return self.project(y, v)
        dtype = x.dtype
        x, y, v = at_least_float32(x, y, v)
        transport = transports.DIFFERENTIATED[self.retraction]
        return transport(x, y, v).astype(dtype)

    def inner(self, x: Array, u: Array, v: Array) -> Array:
        """The metric: tr uᵀ(I − ½XXᵀ)v if canonical, tr uᵀv if Euclidean."""
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
        # Each pass increases the small singular values; the last ones polish.
        return _repeat(3, inverse_root, y).astype(dtype)

    def penalty_gradient(self, x: Array) -> Array:
        """X(XᵀX − I), the gradient of φ(X) = ¼‖XᵀX − I‖², for `landing`."""
        dtype = x.dtype
        (x,) = at_least_float32(x)
        return times(x, deviation(x)).astype(dtype)

    def residual(self, x: Array) -> Array:
        """The constraint violation max |XᵀX − I|, at least float32, of shape (…)."""
        (x,) = at_least_float32(x)
        return jnp.max(jnp.abs(deviation(x)), axis=(-2, -1))

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Require rows ≥ columns."""
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
        return y + times(y, factor(deviation(y)))

    return jax.lax.fori_loop(0, passes, once, y)
