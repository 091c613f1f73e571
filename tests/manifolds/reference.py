"""NumPy and SciPy reference of the geometry in float64, from the definitions."""

import numpy as np
import scipy.linalg
from scipy.integrate import solve_ivp


def each(f, *arrays):
    """Apply f to every matrix of stacked arrays."""
    arrays = [np.asarray(a, np.float64) for a in arrays]
    batch = arrays[0].shape[:-2]
    flat = [a.reshape(-1, *a.shape[-2:]) for a in arrays]
    out = np.stack([f(*matrices) for matrices in zip(*flat, strict=True)])
    return out.reshape(*batch, *out.shape[1:])


def polar(y):
    """The polar factor by singular value decomposition."""
    u, _, vt = np.linalg.svd(y, full_matrices=False)
    return u @ vt


def qr(y):
    """The QR factor by Householder reflections, signs fixed."""
    q, r = np.linalg.qr(y)
    return q * np.where(np.diag(r) < 0, -1, 1)


def cayley(x, v):
    """(I − W/2)⁻¹(I + W/2)X with the n×n skew W = PvXᵀ − XvᵀP, P = I − ½XXᵀ."""
    eye = np.eye(len(x))
    pv = v - x @ (x.T @ v) / 2
    w = pv @ x.T - x @ pv.T
    return np.linalg.solve(eye - w / 2, x + w @ x / 2)


def wen_yin(x, v):
    """The same by U = [Pv X], V = [X −Pv]: X + U(I − ½VᵀU)⁻¹VᵀX, 2r×2r."""
    pv = v - x @ (x.T @ v) / 2
    u, w = np.hstack([pv, x]), np.hstack([x, -pv])
    middle = np.eye(u.shape[1]) - w.T @ u / 2
    return x + u @ np.linalg.solve(middle, w.T @ x)


def exp(x, v, metric):
    """The geodesic by an n×n exponential in the frame [X X⊥].

    Q exp([[2βA, −Bᵀ], [B, 0]]) [I; 0] exp((1 − 2β)A) with β = ½ in the canonical
    metric and 1 in the Euclidean (Hüper, Markina & Silva Leite 2021).
    """
    n, r = x.shape
    q = np.hstack([x, scipy.linalg.null_space(x.T)]) if n > r else x
    a, b = x.T @ v, q[:, r:].T @ v
    beta = 0.5 if metric == "canonical" else 1
    w = np.block([[2 * beta * a, -b.T], [b, np.zeros((n - r, n - r))]])
    turn = scipy.linalg.expm((1 - 2 * beta) * a)
    return q @ scipy.linalg.expm(w)[:, :r] @ turn


def stiefel_retraction(retraction, metric):
    """The retraction of that name, of stacked points and tangents."""
    return {
        "polar": lambda x, v: each(polar, x + v),
        "qr": lambda x, v: each(qr, x + v),
        "cayley": lambda x, v: each(cayley, x, v),
        "exp": lambda x, v: each(lambda x, v: exp(x, v, metric), x, v),
    }[retraction]


def projection(x, v):
    """The tangent nearest to v, by an orthonormal basis of all tangents."""
    n, r = x.shape
    complement = scipy.linalg.null_space(x.T) if n > r else np.zeros((n, 0))
    basis = []
    for i in range(r):
        for j in range(i):
            skew = np.zeros((r, r))
            skew[i, j], skew[j, i] = 1, -1
            basis.append((x @ skew).ravel())
    for i in range(n - r):
        for j in range(r):
            unit = np.zeros((n - r, r))
            unit[i, j] = 1
            basis.append((complement @ unit).ravel())
    q, _ = np.linalg.qr(np.stack(basis, 1) if basis else np.zeros((n * r, 0)))
    return (q @ (q.T @ v.ravel())).reshape(n, r)


def inner(x, u, v, metric):
    """Canonical metric through the n×n weight, or Euclidean."""
    weight = np.eye(len(x)) - (x @ x.T / 2 if metric == "canonical" else 0)
    return np.trace(u.T @ weight @ v)


def geodesic(x, v, ts, metric):
    """The geodesic from (x, v) at increasing times: its differential equation."""
    n, r = x.shape

    def euclidean(_, state):
        c, w = state.reshape(2, n, r)
        return np.concatenate([w.ravel(), (-c @ (w.T @ w)).ravel()])

    def canonical(_, state):  # Edelman, Arias & Smith, eq. 2.41
        c, w = state.reshape(2, n, r)
        a = -(w @ w.T @ c + c @ ((c.T @ w) @ (c.T @ w) + w.T @ w))
        return np.concatenate([w.ravel(), a.ravel()])

    right = {"euclidean": euclidean, "canonical": canonical}[metric]
    start = np.concatenate([x.ravel(), v.ravel()])
    points, now = [], 0.0
    for t in ts:
        options = {"method": "DOP853", "rtol": 1e-13, "atol": 1e-15}
        start = solve_ivp(right, (now, t), start, **options).y[:, -1]
        points.append(start.reshape(2, n, r)[0])
        now = t
    return np.stack(points)


def unit_columns(y):
    """Every column divided by its length."""
    return y / np.linalg.norm(y, axis=-2, keepdims=True)


def sphere_projection(x, v):
    """Each column times its own n×n projector I − xⱼxⱼᵀ."""
    columns = [
        (np.eye(len(x)) - np.outer(c, c) / (c @ c)) @ w
        for c, w in zip(x.T, v.T, strict=True)
    ]
    return np.stack(columns, 1)


def great_circle(x, v):
    """Each column turned in the plane of xⱼ and vⱼ, by an n×n exponential."""
    columns = [
        scipy.linalg.expm(np.outer(w, c) - np.outer(c, w)) @ c
        for c, w in zip(x.T, v.T, strict=True)
    ]
    return np.stack(columns, 1)
