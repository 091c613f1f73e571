"""Re-orthonormalisation of columns after a step, shared by the retractions."""

from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
from jax import Array

from manifold_lora.manifolds.linalg import (
    deviation,
    finite_products,
    inverse_cholesky,
    inverse_root,
    matmul,
    shortening,
    stacked,
    times,
)

# Beyond about these lengths of a step the Gram matrix of X + v, of condition number
# 1 + ‖v‖₂², has no correct digit left for the shortest direction.
_LONGEST = {"float32": 2.0**9, "float64": 2.0**12}


def longest(dtype: Any) -> float:
    """The largest ‖v‖₂ of a step in this dtype; longer ones are shortened to it."""
    return _LONGEST[jnp.dtype(dtype).name]


def small_products(
    xs: Sequence[Array], ds: Sequence[Array]
) -> tuple[list[Array], list[Array], list[Array], list[Array]]:
    """The small matrices of V = ckD, shortened to ‖V‖₂ ≤ `longest`, for all pairs.

    Returns:
        XᵀV, VᵀV, c, and k with which the squares of kD are finite. The product ck may
        be too small for a float32.
    """

    def products(ds: Sequence[Array]) -> list[Array]:
        grams = [matmul(d.mT, d) for d in ds]
        # (DᵀX)ᵀ takes less time on a CPU than XᵀD.
        return grams + [matmul(d.mT, x).mT for x, d in zip(xs, ds, strict=True)]

    found, scales = finite_products(products, ds)
    grams, ws = found[: len(ds)], found[len(ds) :]
    cs = [shortening(g, longest(g.dtype)) for g in grams]
    ws = [c * w for c, w in zip(cs, ws, strict=True)]
    grams = [c**2 * g for c, g in zip(cs, grams, strict=True)]
    return ws, grams, cs, scales


def polish(e: Array) -> Array:
    """(I + E)^(−½) − I for an E already small, ‖E‖ ≤ 0.5."""
    return inverse_root(e, 6 if e.dtype == jnp.float64 else 4)


def orthonormalise(
    kernel: Literal["polar", "qr"],
    xs: Sequence[Array],
    cs: Sequence[Array],
    ds: Sequence[Array],
    qs: Sequence[Array],
    es: Sequence[Array],
    grams: Sequence[Array],
    scales: Sequence[Array | float] | None = None,
) -> tuple[list[Array], list[Array]]:
    """X⁺ = Y T with orthonormal columns, for Y = X(I + C) + kDQ for every list entry.

    The first pass takes T from E = YᵀY − I as given, computed from small matrices.
    Where the step is large E has an error of ε‖YᵀY‖, and X itself may have
    drifted: the second pass takes the true Gram matrix of the first's result,
    near the identity, and is cheap. Iterations that have not converged in the
    first pass continue in the second, since they are functions of YᵀY.

    Args:
        kernel: "polar", T = (YᵀY)^(−½), or "qr", T = R⁻¹ of Y's QR factors.
        xs: points, (…, rows, r).
        cs: (…, r, r).
        ds: vectors of the shape of the points.
        qs: (…, r, r).
        es: (…, r, r).
        grams: DᵀD, (…, r, r); where it is 0 the point does not move at all.
        scales: k, (…, 1, 1); by default 1.

    Returns:
        The points X⁺ and the deviations T − I of the factors.
    """

    def first(e: Array) -> Array:
        return inverse_root(e, 10) if kernel == "polar" else inverse_cholesky(e)

    def second(e: Array) -> Array:
        return polish(e) if kernel == "polar" else inverse_cholesky(e)

    scales = scales or [1.0] * len(ds)
    fs = stacked(first, es)
    ys = [
        x + (times(x, c + f + matmul(c, f)) + times(d, q + matmul(q, f), k))
        for x, c, d, q, f, k in zip(xs, cs, ds, qs, fs, scales, strict=True)
    ]
    moved = [jnp.any(g != 0, axis=(-2, -1), keepdims=True) for g in grams]
    rests = [jnp.where(m, deviation(y), 0) for m, y in zip(moved, ys, strict=True)]
    gs = stacked(second, rests)
    points = [y + times(y, g) for y, g in zip(ys, gs, strict=True)]
    return points, [f + g + matmul(f, g) for f, g in zip(fs, gs, strict=True)]
