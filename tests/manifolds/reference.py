"""The geometry restated in float64 NumPy and SciPy, from the definitions."""

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


RETRACTIONS = {"polar": polar, "qr": qr}


def projection(x, v):
    """The tangent nearest to v, by least squares over a basis of the tangents."""
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
    matrix = np.stack(basis, 1) if basis else np.zeros((n * r, 0))
    weights = np.linalg.lstsq(matrix, v.ravel(), rcond=None)[0]
    return (matrix @ weights).reshape(n, r)


def inner(x, u, v, metric):
    """Canonical metric through the n×n weight, or Euclidean."""
    weight = np.eye(len(x)) - (x @ x.T / 2 if metric == "canonical" else 0)
    return np.trace(u.T @ weight @ v)


def geodesic(x, v, t, metric):
    """The geodesic by integrating its differential equation from (x, v) to t."""
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
    end = solve_ivp(right, (0, t), start, rtol=1e-12, atol=1e-14).y[:, -1]
    return end.reshape(2, n, r)[0]
