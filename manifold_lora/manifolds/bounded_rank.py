"""Matrices of rank at most r by desingularisation, the manifold of LoRAM-BR."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array

from manifold_lora.errors import InputError
from manifold_lora.manifolds.linalg import (
    at_least_float32,
    bounded,
    eye_like,
    inverse_cholesky,
    matmul,
    shortening,
    stacked,
    sym,
    times,
)
from manifold_lora.manifolds.manifold import Manifold
from manifold_lora.manifolds.nuclear import shrink
from manifold_lora.manifolds.orthonormal import longest, orthonormalise
from manifold_lora.manifolds.stiefel import Stiefel

Order = Literal[1, 2]
Point = Mapping[str, Array]


@dataclasses.dataclass(frozen=True)
class BoundedRank(Manifold):
    """Rank at most r: for an update ΔW = A Vᵀ optimised as one matrix, also from 0.

    A point is {"a": (…, m, r), "v": (…, n, r)} with V orthonormal. It stands for
    the pair (ΔW, P) = (A Vᵀ, I − VVᵀ), the desingularisation of the matrices of
    rank at most r, so (AQ, VQ) is the same point for every orthogonal Q. A may be
    any matrix, including zero, where matrices of fixed rank have a boundary. A tangent
    {"a": K, "v": Vₚ} has VᵀVₚ = 0 and moves the pair by (KVᵀ + AVₚᵀ, −VₚVᵀ − VVₚᵀ).
    The metric is tr ΔẆᵀΔẆ + α tr ṖᵀṖ = tr KᵀK + tr Vₚᵀ Vₚ M, M = 2αI + AᵀA.

    Where the singular values stay well above zero, `FixedRank` has the simpler
    metric; for factors that are optimised separately use `Stiefel`.

    Args:
        alpha: weight of the row space relative to the update, > 0; the papers' ½.
        order: of the retraction: 1, the papers'; or 2, which follows geodesics to
            second order at the cost of one more Gram matrix and inverse.

    Raises:
        InputError: unless alpha > 0 and the order is 1 or 2.

    References:
        LoRAM (Jiang, Wang & Stich), algorithms 6 to 8; Rebjock & Boumal,
        "Optimization over bounded-rank matrices through a desingularization",
        2024; Khrulkov & Oseledets, "Desingularization of bounded-rank matrix
        sets", 2018.

    Examples:
        >>> import jax
        >>> import manifold_lora as ml
        >>> manifold = ml.BoundedRank()
        >>> x = manifold.random_point(jax.random.key(0), (64, 48, 4))
        >>> x["a"].shape, x["v"].shape
        ((64, 4), (48, 4))
        >>> v = manifold.random_tangent(jax.random.key(1), x)
        >>> bool(manifold.residual(manifold.retract(x, v)) < 1e-6)
        True
    """

    alpha: float = 0.5
    order: Order = 1

    parts = ("a", "v")

    def __post_init__(self):
        if not self.alpha > 0:
            raise InputError(
                f"BoundedRank needs alpha > 0, got {self.alpha!r}: without it the "
                "metric is singular at A = 0. The papers use alpha=0.5."
            )
        if self.order not in get_args(Order):
            raise InputError(
                f"BoundedRank has no retraction of order {self.order!r}. Use order=1, "
                "the papers', or order=2."
            )

    def project(self, x: Point, v: Point) -> dict[str, Array]:
        """K as it is and Vₚ = (I − VVᵀ)v, orthogonal in the metric."""
        basis, along = at_least_float32(x["v"], v["v"])
        vp = along - times(basis, matmul(basis.mT, along))
        return _like(x, v["a"], vp)

    def riemannian_gradient(self, x: Point, g: Point) -> dict[str, Array]:
        """K = G_a and Vₚ = (I − VVᵀ)G_v M⁻¹, M = 2αI + AᵀA.

        Args:
            x: point.
            g: the plain gradients of a function of ΔW = A Vᵀ by A and by V, that is
                (∇f V, ∇fᵀA).

        Returns:
            A tangent.
        """
        a, v, ga, gv = at_least_float32(x["a"], x["v"], g["a"], g["v"])
        ga, gv = bounded(ga, gv)
        m = self._inverse_metric(matmul(a.mT, a))
        vp = times(gv, m) - times(v, matmul(matmul(v.mT, gv), m))
        return _like(x, ga, vp)

    def retract(self, x: Point, v: Point) -> dict[str, Array]:
        """The point reached along v: a point for every finite v.

            V⁺ = (V + VₚB) H,  A⁺ = (A + K + A N B) H,  H = (I + BᵀNB)^(−½)

        with N = VₚᵀVₚ, and B = I for order 1 or B = I − C, C = KᵀA M⁻¹, for order 2
        (C is scaled down where ‖VₚC‖ would exceed 256, far from any geodesic). So
        A⁺V⁺ᵀ is ΔW + ΔẆ projected to the rows that V⁺ spans. At order 1 it is the
        point of the papers' QR and SVD, but columns keep their identity, as the
        moments of an optimiser need. R(x, 0) = x exactly.

        Before, v is scaled by min(1, c/β, 2³⁰/max |v|) where float32 ends, with
        β ≥ ‖Vₚ‖₂ as in `Stiefel.retract` and c = 512 for order 1, 256 for order 2.
        """
        return self.step([x], [v])[0]

    def step(self, xs: Sequence[Point], ds: Sequence[Point]) -> list[dict[str, Array]]:
        """R(x, P_x(d)) of several points; no projected factor is formed.

        With W = VᵀD the projection is Vₚ = D − VW, so N = DᵀD − WᵀW and
        V + VₚB = V(I − WB) + DB.
        """
        wide = [
            at_least_float32(*(p[k] for p in (x, d) for k in self.parts))
            for x, d in zip(xs, ds, strict=True)
        ]
        a, v, k, d = map(list, zip(*wide, strict=True))
        k, d = zip(*(bounded(*kd) for kd in zip(k, d, strict=True)), strict=True)
        most = longest(d[0].dtype) / self.order
        gram = [matmul(d.mT, d) for d in d]
        scale = [shortening(g, most) for g in gram]
        w = [c * matmul(v.mT, d) for v, d, c in zip(v, d, scale, strict=True)]
        short = [c**2 * g for c, g in zip(scale, gram, strict=True)]
        n = [g - matmul(w.mT, w) for g, w in zip(short, w, strict=True)]
        ka = [c * matmul(k.mT, a) for a, k, c in zip(a, k, scale, strict=True)]
        b = self._corrections(a, ka, short, most)
        nb = stacked(matmul, n, b)
        v, t = orthonormalise(
            "polar",
            v,
            [-wb for wb in stacked(matmul, w, b)],
            d,
            [c * b for c, b in zip(scale, b, strict=True)],
            stacked(lambda b, nb: sym(matmul(b.mT, nb)), b, nb),
            gram,
        )
        # A⁺ − A is formed from small numbers, so that small steps are accurate.
        h = [eye_like(t) + t for t in t]
        c = stacked(lambda nb, h, t: matmul(nb, h) + t, nb, h, t)
        a = [
            a + (times(a, c) + times(k, s * h))
            for a, c, k, h, s in zip(a, c, k, h, scale, strict=True)
        ]
        return [_like(x, a, v) for x, a, v in zip(xs, a, v, strict=True)]

    def _corrections(
        self, a: list[Array], ka: list[Array], dd: list[Array], most: float
    ) -> list[Array]:
        """B of every point: removes the acceleration −2VₚKᵀA M⁻¹ of the row space."""
        if self.order == 1:
            return [eye_like(g) for g in dd]

        def correction(gram: Array, ka: Array, dd: Array) -> Array:
            c = matmul(ka, self._inverse_metric(gram))
            # At least ‖VₚC‖², and as large as the rounding of CᵀVₚᵀVₚC.
            size = jnp.abs(c)
            far = jnp.sum(size * matmul(jnp.abs(dd), size), (-2, -1), keepdims=True)
            far = far / most**2
            return eye_like(c) - c / jnp.sqrt(jnp.maximum(far, 1))

        return stacked(correction, [matmul(a.mT, a) for a in a], ka, dd)

    def _inverse_metric(self, gram: Array) -> Array:
        """M⁻¹ = (2αI + AᵀA)⁻¹ of a Gram matrix AᵀA."""
        f = inverse_cholesky(gram / (2 * self.alpha))
        root = eye_like(f) + f
        return matmul(root, root.mT) / (2 * self.alpha)

    def transport(self, x: Point, y: Point, v: Point) -> dict[str, Array]:
        """The tangent v at x as a pair (ΔẆ, Ṗ), projected to the tangents at y.

            K⁺ = K(VᵀV⁺) + A(VₚᵀV⁺)
            Vₚ⁺ = (I − V⁺V⁺ᵀ)[V(KᵀA⁺ + 2αVₚᵀV⁺) + Vₚ(AᵀA⁺ + 2αVᵀV⁺)](2αI + A⁺ᵀA⁺)⁻¹

        It is non-expansive. LoRAM calls it parallel transport (algorithm 8), which it
        is to first order only.
        """
        arrays = (p[k] for p in (x, y, v) for k in self.parts)
        a, basis, a_new, basis_new, k, vp = at_least_float32(*arrays)
        turn, lean = matmul(basis.mT, basis_new), matmul(vp.mT, basis_new)
        m = self._inverse_metric(matmul(a_new.mT, a_new))
        left = matmul(matmul(k.mT, a_new) + 2 * self.alpha * lean, m)
        right = matmul(matmul(a.mT, a_new) + 2 * self.alpha * turn, m)
        inside = matmul(turn.mT, left) + matmul(lean.mT, right)
        return _like(
            x,
            times(k, turn) + times(a, lean),
            times(basis, left) + times(vp, right) - times(basis_new, inside),
        )

    def inner(self, x: Point, u: Point, v: Point) -> Array:
        """The metric tr KᵀK′ + tr Vₚᵀ Vₚ′ (2αI + AᵀA)."""
        arrays = (x["a"], u["a"], u["v"], v["a"], v["v"])
        a, k1, v1, k2, v2 = at_least_float32(*arrays)
        moved = matmul(v1.mT, v2) * matmul(a.mT, a)
        return (
            jnp.sum(k1 * k2, (-2, -1))
            + 2 * self.alpha * jnp.sum(v1 * v2, (-2, -1))
            + jnp.sum(moved, (-2, -1))
        )

    def shrink(self, x: Point, threshold: Any) -> dict[str, Array]:
        """The proximal step of λ‖ΔW‖₊: singular values σ become max(σ − λ, 0).

        Nuclear norm decay that cannot overshoot, unlike the papers' step along the
        subgradient, which turns σ < λ into λ − σ. V does not change.

        Args:
            x: point.
            threshold: λ ≥ 0, a number or a traced scalar.

        Returns:
            A point; see `nuclear.shrink` for its accuracy.
        """
        return _like(x, shrink(x["a"], threshold), x["v"])

    def random_point(
        self, key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32
    ) -> dict[str, Array]:
        """A point of shape (…, m, n, r): A normal with variance 1/m, V uniform."""
        if len(shape) < 3:
            raise InputError(
                f"{self} needs a shape (…, m, n, r) to draw a point, got "
                f"{tuple(shape)}."
            )
        *batch, m, n, r = shape
        self.check_shape({"a": (*batch, m, r), "v": (*batch, n, r)})
        a_key, v_key = jax.random.split(key)
        wide = jnp.promote_types(dtype, jnp.float32)
        a = jax.random.normal(a_key, (*batch, m, r), wide) / m**0.5
        v = Stiefel().random_point(v_key, (*batch, n, r), dtype)
        return {"a": a.astype(dtype), "v": v}

    def nearest_point(self, y: Point) -> dict[str, Array]:
        """An orthonormal v for the same ΔW: repairs a drifted point.

        With V = QH by its polar factors, A Vᵀ = (A Hᵀ) Qᵀ.
        """
        a, v = at_least_float32(y["a"], y["v"])
        q = Stiefel().nearest_point(v)
        return _like(y, times(a, matmul(v.mT, q)), q)

    def residual(self, x: Point) -> Array:
        """The constraint violation max |VᵀV − I|, in at least float32, of shape (…)."""
        return Stiefel().residual(x["v"])

    def check_shape(self, shape: Mapping[str, tuple[int, ...]]) -> None:
        """Both parts need the same batch and columns, and V rows ≥ columns."""
        for part in self.parts:
            if len(shape[part]) < 2:
                raise InputError(
                    f"{self} needs {part!r} of shape (…, rows, r), got "
                    f"{tuple(shape[part])}."
                )
        a, v = (tuple(shape[part]) for part in self.parts)
        if (*a[:-2], a[-1]) != (*v[:-2], v[-1]):
            raise InputError(
                f"{self} needs parts of one batch and one rank, (…, m, r) and "
                f"(…, n, r), got 'a' of shape {a} and 'v' of shape {v}."
            )
        if v[-2] < v[-1]:
            raise InputError(
                f"{self} needs 'v' with rows ≥ columns, got shape {v}. Lower the rank."
            )


def _like(x: Point, a: Array, v: Array) -> dict[str, Array]:
    """The parts in the dtypes of the point x."""
    return {"a": a.astype(x["a"].dtype), "v": v.astype(x["v"].dtype)}
