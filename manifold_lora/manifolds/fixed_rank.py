"""Matrices of fixed rank, W = U S Vᵀ, the manifold of LoRAM-FR."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jax import Array

from manifold_lora.errors import InputError, check_choice
from manifold_lora.manifolds.linalg import (
    at_least_float32,
    bounded,
    deviation,
    eye_like,
    inverse,
    matmul,
    shortening,
    stacked,
    sym,
    times,
)
from manifold_lora.manifolds.manifold import Manifold
from manifold_lora.manifolds.orthonormal import longest, orthonormalise, polish
from manifold_lora.manifolds.stiefel import Stiefel

Retraction = Literal["truncation", "orthographic"]
Triple = tuple[Array, Array, Array]

# Of C, ‖C‖‖C⁻¹‖ in the Frobenius norm; retraction is accurate to some 1e3.
_WORST_CONDITION = 2000.0


@dataclasses.dataclass(frozen=True)
class FixedRank(Manifold):
    """Matrices of rank r as U S Vᵀ: for an update that is optimised as one matrix.

    A point is a dict of u (…, m, r) and v (…, n, r) with orthonormal columns and an
    invertible s (…, r, r), which need not be diagonal. A tangent has the same keys,
    (Uₚ, M, Vₚ), and stands for the m×n matrix

        U M Vᵀ + Uₚ Vᵀ + U Vₚᵀ,     UᵀUₚ = 0,  VᵀVₚ = 0

    with its Euclidean metric. No m×n matrix is ever formed. The manifold ends where
    S becomes singular: to initialise at the zero matrix use `BoundedRank`, or S = s₀I.
    Where the three factors are optimised separately, as in StelLA, use
    `Stiefel` on u and v. Weight decay belongs on s alone, as `loram` has it: on u
    and v it would be folded into M.

    Args:
        retraction: "truncation" (the default), the best approximation of rank r to
            W + Z, the paper's; it calls LAPACK and may hang on small CPUs, see
            `retract`. "orthographic", by products only: the one for training
            steps as long as S + M is well conditioned. Both are second order.

    Raises:
        InputError: for an unknown retraction.

    References:
        Vandereycken, "Low-rank matrix completion by Riemannian optimization", 2013;
        Absil & Oseledets, "Low-rank retractions: a survey and new results", 2015,
        section 3.6; Jiang, Wang & Stich, "LoRAM: Low-rank adaptation of large
        language models on manifold", 2025, algorithms 1 to 4.

    Examples:
        >>> import jax
        >>> import manifold_lora as ml
        >>> manifold = ml.FixedRank("orthographic")
        >>> x = manifold.random_point(jax.random.key(0), (32, 64, 4))
        >>> {key: part.shape for key, part in x.items()}
        {'u': (32, 4), 's': (4, 4), 'v': (64, 4)}
        >>> y = manifold.retract(x, manifold.random_tangent(jax.random.key(1), x))
        >>> bool(manifold.residual(y) < 1e-6)
        True
    """

    parts: ClassVar[tuple[str, ...]] = ("u", "s", "v")
    retraction: Retraction = "truncation"

    def __post_init__(self):
        check_choice("FixedRank", "retraction", self.retraction, Retraction)

    def project(self, x: Any, v: Any) -> dict[str, Array]:
        """The normal form of a triple: the same matrix, with UᵀUₚ = 0 and VᵀVₚ = 0.

            M ← M + UᵀUₚ + VₚᵀV,   Uₚ ← Uₚ − U UᵀUₚ,   Vₚ ← Vₚ − V VᵀVₚ

        The matrix that any triple stands for is tangent already, so this is the
        orthogonal projection of the embedding.
        """
        return _like(x, _normal_form(_wide(x), _wide(v)))

    def riemannian_gradient(self, x: Any, g: Any) -> dict[str, Array]:
        """P_W(G) of G = ∂f/∂(U S Vᵀ), from the pair G V and GᵀU.

            M = Uᵀ(G V),   Uₚ = G V − U M,   Vₚ = GᵀU − V Mᵀ

        Args:
            x: point.
            g: {"u": G V, "s": UᵀG V, "v": GᵀU}. These are **not** the gradients of
                f with respect to u, s and v, which are G V Sᵀ, UᵀG V and GᵀU S:
                those contain a factor S that would have to be divided out, and vanish
                where it does. An adapter returns the pair from its own derivative rule.
                g["s"] follows from the others and is not read.

        Returns:
            The gradient, a tangent in normal form.
        """
        (u, _, v), (gv, _, gtu) = _wide(x), _bounded(g)
        # Mᵀ in Vₚ comes from GᵀU itself: horizontal whatever the rounding of the pair.
        m, mt = matmul(u.mT, gv), matmul(v.mT, gtu)
        return _like(x, (gv - times(u, m), m, gtu - times(v, mt)))

    def retract(self, x: Any, v: Any) -> dict[str, Array]:
        """The point reached along v.

            truncation     the best approximation of rank r to W + Z
            orthographic   (U + UₚC⁻¹) C (V + VₚC⁻ᵀ)ᵀ,   C = S + M

        Both keep the columns of U and V as near to the old ones as the new column
        spaces allow, so momentum keeps its meaning from step to step. Drift of U and
        V is repaired, but not for v = 0: R(x, 0) = x exactly.

        "truncation" runs QR and SVD of LAPACK, which in a jitted program with other
        such calls can hang indefinitely on a CPU with few cores, and all-gathers on a
        TPU pod: use "orthographic" in training steps. It accepts S = 0, where it
        returns the best rank r of the step, of rank 2r, and so is not a retraction.
        "orthographic" needs an invertible C, in float32 of condition number below about
        1e3: steps of spectral norm below σ_min(S)/2 are safe.

        U and V are orthonormal after every finite v, which is scaled by
        min(1, 2³⁰/max |v|); in "orthographic" C⁻¹ is scaled for U, and for V, by
        min(1, 512/β), β ≥ ‖UₚC⁻¹‖₂ as in `Stiefel.retract`, and is 0 where C is
        singular.

        Args:
            x: point.
            v: tangent at x, or any triple that stands for the same matrix.

        Returns:
            The point reached, of the shapes and dtypes of x.
        """
        return self.step([x], [v])[0]

    def step(self, xs: Sequence[Any], ds: Sequence[Any]) -> list[dict[str, Array]]:
        """R(x, P_x(d)) of several points; no projected factor is formed.

        Both retractions depend on the matrix of a triple alone, and so need no
        projection. Orthographic reads the tall factors of d twice; truncation makes
        one sequence of LAPACK calls for all points of one shape.
        """
        points, vectors = [_wide(x) for x in xs], [_bounded(d) for d in ds]
        if self.retraction == "orthographic":
            ys = _orthographic(points, vectors)
        else:
            triples = [*zip(*points, strict=True), *zip(*vectors, strict=True)]
            rows = stacked(_truncate, *triples)
            ys = [_split(y, x) for y, x in zip(rows, xs, strict=True)]
        return [_like(x, y) for x, y in zip(xs, ys, strict=True)]

    def transport(self, x: Any, y: Any, v: Any) -> dict[str, Array]:
        """P_y(Z), the matrix of the tangent v at x projected to the tangents at y.

            Z V⁺ = U(M VᵀV⁺ + VₚᵀV⁺) + Uₚ VᵀV⁺,   M⁺ = U⁺ᵀZ V⁺
            Uₚ⁺ = Z V⁺ − U⁺M⁺,                     Vₚ⁺ = ZᵀU⁺ − V⁺M⁺ᵀ

        Between any two points. It is non-expansive but not an isometry.
        """
        (u, _, v_), (up, m, vp), (uy, _, vy) = _wide(x), _wide(v), _wide(y)
        a, b = matmul(v_.mT, vy), matmul(vp.mT, vy)
        c, d = matmul(u.mT, uy), matmul(up.mT, uy)
        ma, mc = matmul(m, a) + b, matmul(m.mT, c) + d
        new = matmul(c.mT, ma) + matmul(d.mT, a)
        return _like(
            y,
            (
                times(u, ma) + times(up, a) - times(uy, new),
                new,
                times(v_, mc) + times(vp, c) - times(vy, new.mT),
            ),
        )

    def inner(self, x: Any, u: Any, v: Any) -> Array:
        """The inner product of the two m×n matrices, from their normal forms."""
        point = _wide(x)
        pairs = zip(
            _normal_form(point, _wide(u)), _normal_form(point, _wide(v)), strict=True
        )
        first, *rest = [jnp.sum(a * b, axis=(-2, -1)) for a, b in pairs]
        return sum(rest, first)

    def random_point(
        self, key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32
    ) -> dict[str, Array]:
        """A random point with a well conditioned S.

        Args:
            key: random key.
            shape: (…, m, n, r).
            dtype: of all parts.

        Returns:
            U and V uniform (Haar), S diagonal, evenly spaced from 2 to 1.
        """
        *batch, m, n, r = shape
        self.check_shape(
            {"u": (*batch, m, r), "s": (*batch, r, r), "v": (*batch, n, r)}
        )
        wide = jnp.promote_types(dtype, jnp.float32)
        left, right = jax.random.split(key)
        u = Stiefel().random_point(left, (*batch, m, r), wide)
        v = Stiefel().random_point(right, (*batch, n, r), wide)
        sigma = jnp.diag(jnp.linspace(2, 1, r, dtype=wide))
        s = jnp.broadcast_to(sigma, (*batch, r, r))
        return {k: part.astype(dtype) for k, part in zip("usv", (u, s, v), strict=True)}

    def nearest_point(self, y: Any) -> dict[str, Array]:
        """Orthonormal u and v for the same matrix: repairs a drifted point.

        With U = QH by its polar factors, and V likewise, S becomes H_u S H_vᵀ.
        """
        u, s, v = _wide(y)
        qu, qv = Stiefel().nearest_point(u), Stiefel().nearest_point(v)
        s = matmul(matmul(matmul(qu.mT, u), s), matmul(v.mT, qv))
        return _like(y, (qu, s, qv))

    def residual(self, x: Any) -> Array:
        """The larger of max |UᵀU − I| and max |VᵀV − I|, of shape (…); S is free."""
        return jnp.maximum(Stiefel().residual(x["u"]), Stiefel().residual(x["v"]))

    def check_shape(self, shape: Mapping[str, tuple[int, ...]]) -> None:
        """Points need one rank r, a square s, u and v with rows ≥ r, equal batches."""
        *batch, r = shape["s"][:-2] + shape["s"][-1:]
        problems = []
        for key in self.parts:
            got = tuple(shape[key])
            rows = got[-2] if len(got) > 1 else 0
            right = rows == r if key == "s" else rows >= r
            if len(got) < 2 or got != (*batch, rows, r) or not right:
                need = (*batch, r if key == "s" else f"rows ≥ {r}", r)
                problems.append(f"{key} needs ({', '.join(map(str, need))}), got {got}")
        if problems:
            raise InputError(
                f"{self} needs u (…, m, r), s (…, r, r) and v (…, n, r): "
                f"{'; '.join(problems)}. Transpose the factor or lower the rank."
            )


def _wide(x: Any) -> Triple:
    """The parts in one dtype of at least float32."""
    u, s, v = at_least_float32(x["u"], x["s"], x["v"])
    return u, s, v


def _bounded(d: Any) -> Triple:
    """The parts of a vector with finite squares, scaled together."""
    u, s, v = bounded(*_wide(d))
    return u, s, v


def _like(x: Any, triple: Triple) -> dict[str, Array]:
    """A point or tangent in the dtypes of x."""
    return {
        key: part.astype(x[key].dtype)
        for key, part in zip(FixedRank.parts, triple, strict=True)
    }


def _normal_form(x: Triple, d: Triple) -> Triple:
    """The triple of the same matrix with UᵀUₚ = 0 and VᵀVₚ = 0."""
    (u, _, v), (du, m, dv) = x, d
    a, b = matmul(u.mT, du), matmul(v.mT, dv)
    return du - times(u, a), m + a + b.mT, dv - times(v, b)


def _orthographic(xs: Sequence[Triple], ds: Sequence[Triple]) -> list[Triple]:
    """U⁺ = polar(Y) of Y = U + UₚC⁻¹, V⁺ likewise, and S⁺ = H_u C H_vᵀ.

    With W = UᵀD and Uₚ = D − UW, Y = U(I − WC⁻¹) + DC⁻¹ has the Gram matrix
    I + E, E = C⁻ᵀ(DᵀD − WᵀW)C⁻¹. From U⁺ = YT follows Y = U⁺H with H the
    inverse of that same T: errors in E where C is badly conditioned, or in a U that has
    drifted, then change the factors and not the matrix.
    """
    k = len(xs)
    tall = [x[0] for x in xs] + [x[2] for x in xs]  # all u, then all v
    directions = [d[0] for d in ds] + [d[2] for d in ds]
    ws = [matmul(x.mT, d) for x, d in zip(tall, directions, strict=True)]
    grams = [matmul(d.mT, d) for d in directions]
    cs = [
        x[1] + (d[1] + a + b.mT)
        for x, d, a, b in zip(xs, ds, ws[:k], ws[k:], strict=True)
    ]
    # Where C is singular U and V do not move.
    qs = [jnp.where(jnp.isfinite(q), q, 0) for q in stacked(inverse, cs)]
    qs = stacked(_shortened, grams, qs + [q.mT for q in qs], cs + [c.mT for c in cs])
    es = stacked(
        lambda g, w, q: sym(matmul(matmul(q.mT, g - matmul(w.mT, w)), q)), grams, ws, qs
    )
    shifts = stacked(lambda w, q: -matmul(w, q), ws, qs)
    points, ts = orthonormalise("polar", tall, shifts, directions, qs, es, grams)
    hs = stacked(lambda t: inverse(eye_like(t) + t), ts)
    ss = stacked(lambda h, c, k: matmul(matmul(h, c), k.mT), hs[:k], cs, hs[k:])
    return list(zip(points[:k], ss, points[k:], strict=True))


def _shortened(gram: Array, q: Array, c: Array) -> Array:
    """Q = C⁻¹, scaled so that ‖DQ‖₂ is at most the longest step; DᵀD = gram.

    Where C is singular to rounding so is QᵀDᵀDQ, which is then bounded by |Q|ᵀ|DᵀD||Q|.
    """
    size = jnp.max(jnp.abs(q), axis=(-2, -1), keepdims=True)
    size = jnp.where(size > 0, size, 1)
    unit = q / size  # the square of Q itself may overflow
    norms = [jnp.sqrt(jnp.sum(m**2, (-2, -1), keepdims=True)) for m in (unit, c)]
    singular = norms[0] * size * norms[1] > _WORST_CONDITION
    unit, gram = (jnp.where(singular, jnp.abs(m), m) for m in (unit, gram))
    most = longest(q.dtype) / size
    return shortening(matmul(matmul(unit.mT, gram), unit), most) * q


def _truncate(u: Array, s: Array, v: Array, du: Array, m: Array, dv: Array) -> Array:
    """Algorithm 3 of LoRAM, then the gauge nearest to the old factors.

    LAPACK returns singular vectors of any sign and, where values are equal, any
    basis: U⁺ is turned by the polar factor of U⁺ᵀU, and V⁺ likewise. Zero rows
    let one QR serve both sides.

    Returns:
        The rows of U⁺, S⁺ and V⁺, concatenated.
    """
    r, rows = s.shape[-1], (u.shape[-2], v.shape[-2])
    frames = [jnp.concatenate(pair, axis=-1) for pair in ((u, du), (v, dv))]
    padding = [[(0, 0)] * (s.ndim - 2) + [(0, max(rows) - n), (0, 0)] for n in rows]
    q, t = jnp.linalg.qr(jnp.stack(list(map(jnp.pad, frames, padding))))
    # Columns beyond the rows of a side would point into the padding.
    qs = [q[i, ..., :n, : min(n, 2 * r)] for i, n in enumerate(rows)]
    ts = [t[i, ..., : min(n, 2 * r), :] for i, n in enumerate(rows)]
    eye = eye_like(s)
    core = jnp.block([[s + m, eye], [eye, jnp.zeros_like(s)]])
    core = matmul(matmul(ts[0], core), ts[1].mT)
    a, sigma, bt = jnp.linalg.svd(core, full_matrices=False)
    ys = [times(qs[0], a[..., :r]), times(qs[1], bt[..., :r, :].mT)]
    overlaps = [matmul(y.mT, x) for y, x in zip(ys, (u, v), strict=True)]
    g, _, ht = jnp.linalg.svd(jnp.stack(overlaps))
    turns = matmul(g, ht)
    ys = [times(y, turn) for y, turn in zip(ys, turns, strict=True)]
    ys = [y + times(y, polish(deviation(y))) for y in ys]
    new = matmul(turns[0].mT, sigma[..., :r, None] * turns[1])
    moved = [jnp.any(d != 0, axis=(-2, -1), keepdims=True) for d in (du, m, dv)]
    moves = moved[0] | moved[1] | moved[2]
    old = jnp.concatenate((u, s, v), axis=-2)
    return jnp.where(moves, jnp.concatenate((ys[0], new, ys[1]), axis=-2), old)


def _split(y: Array, x: Any) -> Triple:
    """U, S and V from their rows."""
    m, r = x["u"].shape[-2:]
    return y[..., :m, :], y[..., m : m + r, :], y[..., m + r :, :]
