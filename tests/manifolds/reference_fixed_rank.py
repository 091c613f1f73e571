"""NumPy reference of FixedRank: dense m×n matrices in float64."""

import numpy as np
from scipy.integrate import solve_ivp

PARTS = ("u", "s", "v")


def transposed(a):
    return np.swapaxes(a, -1, -2)


def float64(x):
    return {key: np.asarray(x[key], np.float64) for key in PARTS}


def draw(rng, shape):
    """A point with singular values from 2 to 1; shape is (…, m, n, r)."""
    *batch, m, n, r = shape
    u, q, v = (np.linalg.qr(rng.normal(size=(*batch, k, r)))[0] for k in (m, r, n))
    return {"u": u, "s": np.linspace(2, 1, r)[:, None] * q, "v": v}


def ambient(rng, x):
    """A triple that is not in normal form."""
    return {key: rng.normal(size=x[key].shape) for key in PARTS}


def tangent(rng, x):
    """A tangent in normal form."""
    d = ambient(rng, x)
    for key in ("u", "v"):
        d[key] = d[key] - x[key] @ (transposed(x[key]) @ d[key])
    return d


def dense(x):
    """W = U S Vᵀ."""
    x = float64(x)
    return x["u"] @ x["s"] @ transposed(x["v"])


def dense_tangent(x, v):
    """Z = U M Vᵀ + Uₚ Vᵀ + U Vₚᵀ of any triple."""
    x, v = float64(x), float64(v)
    z = x["u"] @ v["s"] @ transposed(x["v"]) + v["u"] @ transposed(x["v"])
    return z + x["u"] @ transposed(v["v"])


def residual(x):
    """The largest entry of |UᵀU − I| and |VᵀV − I|."""
    grams = [transposed(y) @ y for y in (float64(x)[key] for key in ("u", "v"))]
    return np.max([np.abs(g - np.eye(g.shape[-1])).max((-2, -1)) for g in grams], 0)


def spaces(w, r):
    """The orthogonal projectors on the column and the row space of W, of rank r."""
    a, _, bt = np.linalg.svd(w, full_matrices=False)
    a, b = a[..., :r], transposed(bt)[..., :r]
    return a @ transposed(a), b @ transposed(b)


def dense_projection(w, z, r):
    """P_W(Z) = P_U Z + Z P_V − P_U Z P_V, from W alone."""
    left, right = spaces(w, r)
    return left @ z + z @ right - left @ z @ right


def projection(x, v):
    """P_W(Z) of the matrix Z of a triple, by the projectors of U and V."""
    x, z = float64(x), dense_tangent(x, v)
    left, right = (x[key] @ transposed(x[key]) for key in ("u", "v"))
    return left @ z + z @ right - left @ z @ right


def best(w, r):
    """The best approximation of rank r."""
    a, sigma, bt = np.linalg.svd(w, full_matrices=False)
    return (a[..., :r] * sigma[..., None, :r]) @ bt[..., :r, :]


def retract_truncation(x, v):
    """The dense best approximation of rank r to W + Z."""
    return best(dense(x) + dense_tangent(x, v), np.shape(x["s"])[-1])


def retract_orthographic(x, v):
    """The matrix of rank r nearest in form: (W + Z)V (UᵀXV)⁻¹ Uᵀ(W + Z).

    The only matrix X of rank r with P_W(X − W) = Z has UᵀX = Uᵀ(W + Z) and
    XV = (W + Z)V, and is X = XV (UᵀXV)⁻¹ UᵀX.
    """
    x, moved = float64(x), dense(x) + dense_tangent(x, v)
    left, right = transposed(x["u"]) @ moved, moved @ x["v"]
    return right @ np.linalg.solve(left @ x["v"], left)


def geodesic(x, v, times):
    """The geodesic from W along Z by its equation W″ = 2 (I − P_U) Z W⁻ Z (I − P_V).

    W⁻ is the pseudo-inverse; the right-hand side is the derivative of the tangent
    projection along Z, applied to Z (Absil, Mahony & Trumpf 2013).
    """
    r, start = np.shape(x["s"])[-1], np.stack([dense(x), dense_tangent(x, v)])

    def right(_, state):
        w, z = state.reshape(start.shape)
        left, row = spaces(w, r)
        normal = z - left @ z, z - z @ row
        bend = 2 * normal[0] @ np.linalg.pinv(w, 1e-6) @ normal[1]
        return np.concatenate([z.ravel(), bend.ravel()])

    solution = solve_ivp(right, (0, max(times)), start.ravel(), t_eval=times,
                         rtol=1e-11, atol=1e-13, method="DOP853")  # fmt: skip
    return solution.y.T.reshape(-1, *start.shape)[:, 0]


def orthographic_error(x, z, moved):
    """How far P_W(W⁺ − W) is from Z."""
    back = dense_projection(dense(x), moved, np.shape(x["s"])[-1])
    return np.abs(back - z).max()
