"""Spectral measures of a factor or of a product of two, in float64 NumPy."""

from typing import NamedTuple

import numpy as np

RANK_THRESHOLD = 1e-2  # of the numerical rank, relative to the largest singular value
_BLOCK = 64 * 2**20  # bytes of a block of ΔW, which is never formed as a whole


class Cosines(NamedTuple):
    """Statistics of the cosine similarities of columns; NaN if there are no pairs."""

    mean: float
    std: float
    largest: float  # in absolute value


class MatrixEntry(NamedTuple):
    """An entry of a matrix and its indices."""

    row: int
    column: int
    value: float


def effective_rank(x: np.ndarray) -> np.ndarray:
    """Entropy effective rank exp(−Σ p log p), p = σ/Σσ, one number per batch entry.

    r for r orthonormal columns, near 1 if one direction dominates, 0 for the zero
    matrix.

    Args:
        x: (…, rows, columns).

    References:
        Roy & Vetterli, "The effective rank", 2007.

    Examples:
        >>> float(effective_rank(np.eye(5)[:, :3]).round(6))
        3.0
    """
    sigma = singular_values(x)
    p = sigma / np.maximum(sigma.sum(-1, keepdims=True), np.finfo(float).tiny)
    entropy = -np.sum(p * np.log(np.where(p > 0, p, 1)), axis=-1)
    return np.where(sigma[..., 0] > 0, np.exp(entropy), 0.0)


def stable_rank(x: np.ndarray) -> np.ndarray:
    """Stable rank ‖x‖_F²/‖x‖₂² = Σσ²/σ₁², one number per batch entry.

    Less sensitive to small singular values than `effective_rank`, and never above the
    rank; 0 for the zero matrix.

    Args:
        x: (…, rows, columns).

    References:
        Rudelson & Vershynin, "Sampling from large matrices", 2007,
        arXiv:math/0503442.

    Examples:
        >>> float(stable_rank(np.diag([2.0, 1.0])))
        1.25
    """
    sigma = singular_values(x)
    largest = sigma[..., :1]
    return np.sum((sigma / np.where(largest > 0, largest, 1)) ** 2, axis=-1)


def numerical_rank(x: np.ndarray, threshold: float = RANK_THRESHOLD) -> np.ndarray:
    """Number of singular values above `threshold` times the largest.

    Args:
        x: (…, rows, columns).
        threshold: relative to the largest singular value.

    Examples:
        >>> int(numerical_rank(np.diag([5.0, 1.0, 0.01])))
        2
    """
    sigma = singular_values(x)
    return np.sum(sigma > threshold * sigma[..., :1], axis=-1)


def singular_values(x: np.ndarray) -> np.ndarray:
    """Singular values σ₁ ≥ σ₂ ≥ … of (…, rows, columns)."""
    return np.linalg.svd(np.asarray(x, np.float64), compute_uv=False)


def compressed_product(b: np.ndarray, a: np.ndarray) -> np.ndarray:
    """A small matrix with the non-zero singular values of b aᵀ.

    R_b R_aᵀ from the QR decompositions b = Q_b R_b and a = Q_a R_a. All measures above
    are the same for it as for b aᵀ, which may be too large to form.

    Args:
        b: (…, m, r).
        a: (…, n, r).

    Returns:
        (…, min(m, r), min(n, r)).

    Examples:
        >>> b, a = np.diag([3.0, 2.0]), np.ones((5, 2)) @ np.diag([1.0, 0.0])
        >>> singular_values(compressed_product(b, a)).round(6).tolist()
        [6.708204, 0.0]
    """
    _, r_a = np.linalg.qr(np.asarray(a, np.float64))
    _, r_b = np.linalg.qr(np.asarray(b, np.float64))
    return r_b @ r_a.swapaxes(-1, -2)


def gram(x: np.ndarray) -> np.ndarray:
    """The Gram matrix xᵀx in float64, (…, columns, columns)."""
    x = np.asarray(x, np.float64)
    return x.swapaxes(-1, -2) @ x


def column_cosines(x: np.ndarray) -> Cosines:
    """Cosine similarities of the columns: xᵢᵀxⱼ/(‖xᵢ‖‖xⱼ‖) for all pairs i < j.

    0 for orthogonal columns, whatever their norms. Zero columns are ignored; if fewer
    than two others remain, all statistics are NaN.

    Args:
        x: (rows, columns).

    Examples:
        >>> column_cosines(np.eye(3))
        Cosines(mean=0.0, std=0.0, largest=0.0)
    """
    products = gram(x)
    norms = np.sqrt(np.diag(products))
    products, norms = products[np.ix_(norms > 0, norms > 0)], norms[norms > 0]
    if len(norms) < 2:
        return Cosines(np.nan, np.nan, np.nan)
    pairs = np.triu_indices(len(norms), 1)
    cosines = (products / norms / norms[:, None])[pairs]
    return Cosines(
        float(cosines.mean()), float(cosines.std()), float(np.abs(cosines).max())
    )


def principal_angles(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Principal angles between the column spaces of two matrices, in degrees.

    All 0 for equal subspaces, whatever their bases; 90 for a direction of one that is
    orthogonal to the other. Computed from sines and cosines, because cosines alone do
    not resolve angles below 1e-6 degrees.

    Args:
        x: (rows, p).
        y: (rows, q).

    Returns:
        As many angles as the smaller of the two ranks, ascending; none for the zero
        matrix.

    References:
        Knyazev & Argentati, "Principal angles between subspaces in an A-based scalar
        product", 2002.

    Examples:
        >>> principal_angles(np.eye(3)[:, :2], np.array([[1.0], [0], [1]])).round(6)
        array([45.])
    """
    q, p = sorted((_basis(x), _basis(y)), key=lambda basis: -basis.shape[1])
    cosines = np.linalg.svd(q.T @ p, compute_uv=False)
    sines = np.linalg.svd(p - q @ (q.T @ p), compute_uv=False)[::-1]
    return np.degrees(np.arctan2(sines, cosines))


def _basis(x: np.ndarray) -> np.ndarray:
    """An orthonormal basis of the column space, up to float32 rounding."""
    u, sigma, _ = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
    rounding = x.shape[1] * float(np.finfo(np.float32).eps)
    return u[:, sigma > rounding * sigma[0]]


def largest_entries(b: np.ndarray, a: np.ndarray, count: int = 5) -> list[MatrixEntry]:
    """The entries of b aᵀ of largest absolute value, in descending order.

    The product is formed in float32, one 64 MiB block of rows at a time; the values
    returned are computed in float64.

    Args:
        b: (m, r).
        a: (n, r).
        count: number of entries.

    Examples:
        >>> largest_entries(np.array([[1.0], [-3.0]]), np.array([[1.0], [2.0]]), 1)
        [MatrixEntry(row=1, column=1, value=-6.0)]
    """
    b, a = np.asarray(b, np.float64), np.asarray(a, np.float64)
    left, right = b.astype(np.float32), a.astype(np.float32).T
    height = max(1, _BLOCK // (4 * right.shape[1]))
    row_maxima = []
    for row in range(0, len(left), height):
        block = left[row : row + height] @ right
        row_maxima.append(np.maximum(block.max(axis=1), -block.min(axis=1)))
    # The `count` largest entries are in the `count` rows with the largest maxima.
    rows = np.argsort(-np.concatenate(row_maxima), kind="stable")[:count]
    product = b[rows] @ a.T
    order = np.argsort(-np.abs(product), axis=None, kind="stable")[:count]
    indices = zip(*np.unravel_index(order, product.shape), strict=True)
    return [MatrixEntry(int(rows[i]), int(j), float(product[i, j])) for i, j in indices]
