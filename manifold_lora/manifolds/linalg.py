"""Small-matrix kernels of the geometry: products only, batched, without LAPACK.

Two reasons for products only: a jitted program with several independent LAPACK
calls can hang on a CPU with few cores, and on a TPU pod products of sharded factors
need no all-gather. Two reasons for one helper: JAX multiplies float32 in TF32 on NVIDIA
and in bfloat16 on TPU by default: a constraint violation of 2e-4 instead of 2e-7.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AxisType


def matmul(a: Array, b: Array) -> Array:
    """The product of stacked matrices at full precision on every backend."""
    spec = None
    if _is_sharded(a, -1) or _is_sharded(b, -2):  # as in XᵀX with rows sharded
        left, right = (jax.typeof(x).sharding.spec for x in (a, b))
        spec = jax.P(*left[:-1], right[-1])
    return jnp.matmul(a, b, precision="highest", out_sharding=spec)


def _is_sharded(x: Array, axis: int) -> bool:
    """True where an axis is sharded by a mesh with explicit axes."""
    return jax.typeof(x).sharding.spec[axis] is not None


def _may_be_sharded() -> bool:
    """True on a mesh with automatic axes, where types do not show the sharding."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.size > 1 and AxisType.Auto in mesh.axis_types


def times(x: Array, s: Array, scale: Array | float = 1) -> Array:
    """The product kXS of a tall X, (…, rows, r), a small S, (…, r, columns), and k.

    The scale k is applied to X, which may be so large that kS would be too small for a
    float32. On CPU it is a sum of r scaled columns, which the compiler fuses with the
    operations before and after: a third of the time of a separate product with
    its own passes over memory.
    """
    r = s.shape[-2]
    if r > 32:  # a longer sum takes too long to compile
        return matmul(scale * x, s)

    def columns(x: Array, s: Array, scale: Array) -> Array:
        total = scale * x[..., :1] * s[..., :1, :]
        for k in range(1, r):
            total = total + scale * x[..., k : k + 1] * s[..., k : k + 1, :]
        return total

    def product(x: Array, s: Array, scale: Array) -> Array:
        return matmul(scale * x, s)

    return jax.lax.platform_dependent(x, s, scale, cpu=columns, default=product)


def sym(a: Array) -> Array:
    """The symmetric part (A + Aᵀ)/2."""
    return (a + a.mT) / 2


def eye_like(a: Array) -> Array:
    """The identity in the shape, dtype and sharding of the square A."""
    return jnp.zeros_like(a) + jnp.eye(a.shape[-1], dtype=a.dtype)


def at_least_float32(*arrays: Array) -> tuple[Array, ...]:
    """Promote to one common dtype of at least float32, for computing."""
    dtype = jnp.result_type(jnp.float32, *arrays)
    return tuple(a.astype(dtype) for a in arrays)


# Largest entry of a vector that is worked with: its powers stay finite.
LARGEST = 2.0**30


def bounded(*parts: Array, axis: Any = (-2, -1)) -> tuple[Array, ...]:
    """The parts of one vector, scaled together so that max |entry| ≤ 2³⁰.

    So that the squares of any finite vector are finite. Exactly the vector itself
    where no entry along the axes is larger. Infinite entries become NaN.
    """
    scale = _scale_of(*parts, axis=axis)
    return tuple(p * scale.astype(p.dtype) for p in parts)


def _scale_of(*parts: Array, axis: Any = (-2, -1)) -> Array:
    sizes = [jnp.max(jnp.abs(p), axis=axis, keepdims=True) for p in parts]
    size = functools.reduce(jnp.maximum, sizes)
    return jnp.where(size <= LARGEST, 1, LARGEST / jnp.maximum(size, LARGEST))


def finite_products(
    products: Callable[[Sequence[Array]], list[Array]], ds: Sequence[Array]
) -> tuple[list[Array], list[Array]]:
    """Products r×r of tall vectors, finite for all finite vectors.

    The products are those of cD, with c = 1 where they are at most 2³⁰, and elsewhere
    the scale of `bounded`: a pass over memory that is hardly ever needed.

    Args:
        products: of the vectors, each (…, rows, r), to a list of (…, r, r), in which
            every vector has a part.
        ds: the vectors.

    Returns:
        The products, and c of each vector, (…, 1, 1).
    """

    def scaled() -> tuple[list[Array], list[Array]]:
        scales = [_scale_of(d).astype(d.dtype) for d in ds]
        return products([c * d for c, d in zip(scales, ds, strict=True)]), scales

    # On a mesh the condition would be one more collective.
    if _may_be_sharded() or any(any(jax.typeof(d).sharding.spec) for d in ds):
        return scaled()
    plain = products(ds)
    fine = functools.reduce(jnp.logical_and, [_is_bounded(p) for p in plain])
    ones = [jnp.ones((*d.shape[:-2], 1, 1), d.dtype) for d in ds]
    return jax.lax.cond(fine, lambda: (plain, ones), scaled)


def _is_bounded(x: Array) -> Array:
    """Whether no entry is larger than 2³⁰, or NaN."""
    return jnp.max(jnp.abs(x), initial=0) <= LARGEST


def shortening(gram: Array, most: Any) -> Array:
    """The factor that shortens D to ‖D‖₂ ≤ most, from G = DᵀD: shape (…, 1, 1).

    min(1, most/β) with β² = max_i Σ_j |G_ij| ≥ ‖D‖₂²; exactly 1 where β ≤ most.
    """
    square = jnp.max(jnp.sum(jnp.abs(gram), -1, keepdims=True), -2, keepdims=True)
    limit = most**2  # the root of a maximum: √ has no derivative at 0
    return jnp.where(square <= limit, 1, most / jnp.sqrt(jnp.maximum(square, limit)))


def stacked(kernel: Callable[..., Array], *lists: Sequence[Array]) -> list[Array]:
    """Map a kernel over lists of small matrices, in one call per shape.

    The small matrices of all factors of one rank have one shape, whatever their
    rows: on a GPU one sequence of launches serves them all.
    """
    groups: dict[tuple, list[int]] = {}
    for i, matrices in enumerate(zip(*lists, strict=True)):
        key = tuple((m.shape, m.dtype) for m in matrices)
        groups.setdefault(key, []).append(i)
    results: dict[int, Array] = {}
    for group in groups.values():
        if len(group) == 1:
            results[group[0]] = kernel(*(matrices[group[0]] for matrices in lists))
            continue
        out = kernel(*(jnp.stack([matrices[i] for i in group]) for matrices in lists))
        results.update((i, out[k]) for k, i in enumerate(group))
    return [results[i] for i in range(len(results))]


def deviation(x: Array) -> Array:
    """XᵀX − I, shape (…, r, r): zero when the columns of X are orthonormal.

    A retraction is only as orthonormal as the Gram matrix it is computed from. The
    running sums of the diagonal grow to 1 and lose ε√n to rounding, 4e-7 at 4096
    rows; summed again in blocks of 64 rows they lose 6e-8.
    """
    n, r = x.shape[-2:]
    blocks, product = n // 64, matmul(x.mT, x)
    eye = jnp.eye(r, dtype=x.dtype)
    # On a mesh each device sums its own rows.
    if blocks < 2 or _is_sharded(x, -2) or _may_be_sharded():
        return product - eye
    head = x[..., : blocks * 64, :].reshape(*x.shape[:-2], blocks, 64, r)
    squares = jnp.sum(jnp.sum(head**2, axis=-2), axis=-2)
    if n % 64:
        squares = squares + jnp.sum(x[..., blocks * 64 :, :] ** 2, axis=-2)
    return jnp.where(eye > 0, squares[..., None, :] - 1, product)


def is_large(e: Array) -> Array:
    """True where ‖E‖ > ½, shape (…, 1, 1): the root of I + E needs scaling."""
    return jnp.linalg.norm(e, axis=(-2, -1), keepdims=True) > 0.5


def inverse_root(e: Array, steps: int | None = None) -> Array:
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
        steps: iterations; by default as many as the largest E needs. With fewer
            the result is another function of E, which still commutes with it.

    Returns:
        F of the shape of e: I + F is the inverse square root of I + E.
    """
    eye = eye_like(e)
    bound = jnp.linalg.norm(eye + e, axis=(-2, -1), keepdims=True)
    c = jnp.where(is_large(e), jnp.maximum(bound, 1), jnp.ones_like(bound))
    ell = jnp.where(c == 1, jnp.ones_like(c), jax.lax.rsqrt(c))
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

    if steps is None:
        steps = 16 if e.dtype == jnp.float64 else 13
    return jax.lax.fori_loop(0, steps, iteration, (d, f, ell))[1]


def inverse_cholesky(e: Array) -> Array:
    """R⁻¹ − I, where I + E = RᵀR with R upper triangular, positive diagonal.

    Gram–Schmidt on the columns w_k of W = R⁻¹ in the inner product of I + E,
    one rank-one update per column, on all matrices of the batch at once. Pivots
    are clamped to ε times the largest diagonal entry: a later pass with the
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


def inverse(a: Array) -> Array:
    """A⁻¹ by Gauss–Jordan elimination with row pivoting, one column at a time.

    Args:
        a: (…, r, r), invertible.

    Returns:
        The inverse, of the shape of a; exactly I for A = I.
    """
    r = a.shape[-1]
    index = jnp.arange(r)

    def column(k, carry):
        a, b, free = carry  # free: rows that have not been a pivot yet
        col = jax.lax.dynamic_index_in_dim(a, k, -1, keepdims=False)  # (…, r)
        size = jnp.where(free, jnp.abs(col), -1)
        chosen = index == jnp.argmax(size, axis=-1, keepdims=True)
        one_hot = chosen.astype(a.dtype)[..., None]
        pivot = jnp.sum(one_hot[..., 0] * col, axis=-1)[..., None, None]
        # Every other row loses its multiple of the pivot row, which is scaled.
        factor = jnp.where(chosen, 0, col)[..., None]
        rows = [jnp.sum(one_hot * m, axis=-2, keepdims=True) / pivot for m in (a, b)]
        a, b = (
            jnp.where(one_hot > 0, row, m - factor * row)
            for m, row in zip((a, b), rows, strict=True)
        )
        return a, b, free & ~chosen

    eye = eye_like(a)
    free = eye[..., 0] >= 0
    # A is now a permutation P, and B = P A⁻¹.
    p, b, _ = jax.lax.fori_loop(0, r, column, (a, eye, free))
    return matmul(jnp.round(p).mT, b)


def lyapunov(a: Array, q: Array) -> Array:
    """The solution X of AX + XAᵀ = Q, for A with eigenvalues of positive real part.

    Newton's iteration for the sign of A, without determinant scaling:
    A ← ½(A + A⁻¹), Q ← ½(Q + A⁻¹QA⁻ᵀ), X = Q/2 (Roberts 1980, "Linear model
    reduction and solution of the algebraic Riccati equation"). Both matrices of
    shape (…, r, r), eigenvalues of A between about 1e-3 and 1e3.
    """

    def iteration(_, carry):
        a, q = carry
        b = inverse(a)
        return (a + b) / 2, (q + matmul(matmul(b, q), b.mT)) / 2

    return jax.lax.fori_loop(0, 16, iteration, (a, q))[1] / 2


def expm(a: Array) -> Array:
    """The matrix exponential by scaling and squaring of the Taylor series.

    Args:
        a: (…, r, r), of Frobenius norm below about 2,000.

    Returns:
        exp(A), of the shape of a; exactly I for A = 0.
    """
    degree, most = (16, 12) if a.dtype == jnp.float64 else (9, 12)
    # The number of squarings is a constant, and ‖·‖ has no derivative at 0.
    norm = jnp.linalg.norm(jax.lax.stop_gradient(a), axis=(-2, -1), keepdims=True)
    squarings = jnp.clip(jnp.ceil(jnp.log2(jnp.maximum(2 * norm, 1))), 0, most)
    a = a * jnp.exp2(-squarings)
    eye = eye_like(a)

    def horner(k, e):
        return eye + matmul(a, e) / (degree - k).astype(a.dtype)

    def square(k, e):
        return jnp.where(k < squarings, matmul(e, e), e)

    e = jax.lax.fori_loop(0, degree, horner, eye)
    return jax.lax.fori_loop(0, most, square, e)
