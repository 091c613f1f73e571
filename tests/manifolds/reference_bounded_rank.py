"""Matrices of bounded rank in dense float64 NumPy, as LoRAM's algorithms print them.

A point {"a", "v"} stands for the dense pair (W, P) = (AVᵀ, I − VVᵀ), a tangent
{"a": K, "v": Vₚ} for its motion. Algorithms 5 to 8 work on the paper's factors
(U, S, V) of W, with the signs of Algorithm 7 for (K, Vₚ) instead of (−K, −Vₚ). All
functions are batched over leading axes unless they say otherwise.
"""

import numpy as np
from scipy.integrate import solve_ivp

ALPHA = 0.5


def t(x):
    return np.swapaxes(x, -1, -2)


def draw(rng, shape):
    """A point of shape (…, m, n, r) whose A is of size 1."""
    *batch, m, n, r = shape
    v = np.linalg.qr(rng.normal(size=(*batch, n, r)))[0]
    return {"a": rng.normal(size=(*batch, m, r)) / m**0.5, "v": v}


def ambient(rng, x):
    return {part: rng.normal(size=x[part].shape) for part in x}


def projection(x, z):
    """K as it is; Vₚ in an orthonormal basis of the complement of V."""
    r = x["v"].shape[-1]
    complement = np.linalg.svd(x["v"], full_matrices=True)[0][..., r:]
    return {"a": z["a"], "v": complement @ (t(complement) @ z["v"])}


def tangent(rng, x):
    return projection(x, ambient(rng, x))


def dense(x):
    w = x["a"] @ t(x["v"])
    return w, np.eye(w.shape[-1]) - x["v"] @ t(x["v"])


def dense_tangent(x, v):
    half = v["v"] @ t(x["v"])
    return v["a"] @ t(x["v"]) + x["a"] @ t(v["v"]), -half - t(half)


def inner(x, u, v, alpha=ALPHA):
    """The metric of the ambient space of pairs."""
    pairs = zip(dense_tangent(x, u), dense_tangent(x, v), strict=True)
    w, p = (np.sum(a * b, (-2, -1)) for a, b in pairs)
    return w + alpha * p


def paper(x):
    """U, diag S, V with W = U S Vᵀ, and the rotation H: V = x["v"] H."""
    u, s, ht = np.linalg.svd(x["a"], full_matrices=False)
    return u, s[..., None] * np.eye(s.shape[-1]), x["v"] @ t(ht), t(ht)


def dense_paper(u, s, v):
    return dense({"a": u @ s, "v": v})


def weight(s, alpha):
    """(2αI + S²)⁻¹."""
    return np.linalg.inv(2 * alpha * np.eye(s.shape[-1]) + s @ s)


def algorithm_6(u, s, v, g, alpha=ALPHA):
    """The gradient (K, Vₚ) of f at W, from the dense ∇f(W)."""
    k, b = g @ v, t(g) @ u
    return k, (b - v @ (t(v) @ b)) @ s @ weight(s, alpha)


def algorithm_7(u, s, v, k, vp, nuclear=0.0):
    """The retraction, less λU first."""
    q, _ = np.linalg.qr(v + vp)
    w = (u @ s + k - nuclear * u) @ (t(v) @ q) + u @ s @ (t(vp) @ q)
    u, s, ht = np.linalg.svd(w, full_matrices=False)
    return u, s[..., None] * np.eye(s.shape[-1]), q @ t(ht)


def algorithm_8(old, new, k, vp, alpha=ALPHA):
    """The transport from the factors `old` to the factors `new`."""
    (u, s, v), (u_new, s_new, v_new) = old, new
    a = u_new @ s_new
    left, right = np.concatenate([k, u @ s], -1), np.concatenate([v, vp], -1)
    moved = right @ (t(left) @ a)
    moved = moved + 2 * alpha * (vp @ (t(v) @ v_new) + v @ (t(vp) @ v_new))
    moved = moved - v_new @ (t(v_new) @ moved)
    return left @ (t(right) @ v_new), moved @ weight(s_new, alpha)


def algorithm_5(x, gradient, rate, steps, b1=0.9):
    """The points of RAdam at λ = 0, its second moments taken as 1.

    Element-wise second moments depend on the columns that the paper's SVD happens
    to choose; without them the points W do not.
    """
    u, s, v, _ = paper(x)
    moment = (0 * u, 0 * v)
    for _ in range(steps):
        g = algorithm_6(u, s, v, gradient(u @ s @ t(v)))
        moment = [b1 * m + (1 - b1) * g for m, g in zip(moment, g, strict=True)]
        new = algorithm_7(u, s, v, *(-rate * m for m in moment))
        moment = algorithm_8((u, s, v), new, *moment)
        u, s, v = new
        yield dense_paper(u, s, v)


def shrunk(a, threshold):
    """Singular values σ of A become max(σ − λ, 0)."""
    u, s, vt = np.linalg.svd(np.asarray(a, np.float64), full_matrices=False)
    return u * np.maximum(s - threshold, 0)[..., None, :] @ vt


def projector(w, p, r, alpha=ALPHA):
    """The orthogonal projector to the tangents at one pair, on flat (E, √α F).

    Built from a basis of the tangents, for pairs a little off the manifold too.
    """
    m, n = w.shape
    values, vectors = np.linalg.eigh((p + p.T) / 2)
    v, complement = vectors[:, :r], vectors[:, r:]  # P is near 0 on V, 1 beside it
    assert values[r - 1] < 0.5 < values[r:].min(initial=1)
    x = {"a": w @ v, "v": v}
    zero = {"a": np.zeros((m, r)), "v": np.zeros((n, r))}
    units = [zero | {"a": e.reshape(m, r)} for e in np.eye(m * r)]
    units += [
        zero | {"v": complement @ e.reshape(n - r, r)} for e in np.eye((n - r) * r)
    ]
    rows = [flat(*dense_tangent(x, unit), alpha) for unit in units]
    q, _ = np.linalg.qr(np.stack(rows, 1))
    return q @ q.T


def flat(e, f, alpha=ALPHA):
    """A pair as a vector of the same length."""
    return np.concatenate([e.ravel(), np.sqrt(alpha) * f.ravel()])


def geodesic(x, v, times, alpha=ALPHA):
    """One geodesic, flat, at several times: c″ = DP_c[c′]c′ integrated."""
    m, n, r = len(x["a"]), *x["v"].shape
    size = m * n + n * n

    def at(c):
        return projector(
            c[: m * n].reshape(m, n), c[m * n :].reshape(n, n) / alpha**0.5, r, alpha
        )

    def right(_, state):
        c, w = state[:size], state[size:]
        h = 1e-5
        return np.concatenate([w, (at(c + h * w) - at(c - h * w)) @ w / (2 * h)])

    start = np.concatenate([flat(*dense(x), alpha), flat(*dense_tangent(x, v), alpha)])
    span = (0, max(times))
    path = solve_ivp(right, span, start, t_eval=times, rtol=1e-10, atol=1e-12)
    return path.y[:size].T
