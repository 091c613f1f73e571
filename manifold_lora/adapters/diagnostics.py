"""Numbers that describe a factor, or a product of two. NumPy alone, in float64."""

from typing import NamedTuple

import numpy as np

USED = 1e-2  # of the largest singular value: what a direction needs to count as used
# Bytes of ΔW that are formed at a time, whatever its size.
_BLOCK = 64 * 2**20


class Cosines(NamedTuple):
    """Cosine similarities between the columns of a matrix; NaN without any pair."""

    mean: float
    std: float
    largest: float  # of the absolute values


class Weight(NamedTuple):
    """One entry of a matrix and its place."""

    row: int
    column: int
    value: float


def effective_rank(x: np.ndarray) -> np.ndarray:
    """Entropy effective rank exp(−Σ p log p), p = σ/Σσ, one number per batch entry.

    r for orthonormal columns; near 1 where one direction has taken over; 0 for a
    matrix of zeros.

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

    Less affected by small singular values than `effective_rank`, and never above the
    rank; 0 for a matrix of zeros.

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


def used_rank(x: np.ndarray, threshold: float = USED) -> np.ndarray:
    """How many singular values exceed `threshold` times the largest.

    Args:
        x: (…, rows, columns).
        threshold: share of the largest singular value.

    Examples:
        >>> int(used_rank(np.diag([5.0, 1.0, 0.01])))
        2
    """
    sigma = singular_values(x)
    return np.sum(sigma > threshold * sigma[..., :1], axis=-1)


def singular_values(x: np.ndarray) -> np.ndarray:
    """Singular values σ₁ ≥ σ₂ ≥ … of (…, rows, columns)."""
    return np.linalg.svd(np.asarray(x, np.float64), compute_uv=False)


def core(b: np.ndarray, a: np.ndarray) -> np.ndarray:
    """A small matrix with the non-zero singular values of b aᵀ.

    With b = Q_b R_b and a = Q_a R_a it is R_b R_aᵀ, so that everything above can be
    computed of a product of tall matrices that is too large to form.

    Args:
        b: (…, m, r).
        a: (…, n, r).

    Returns:
        (…, r, r), smaller where m or n is less than r.

    Examples:
        >>> b, a = np.diag([3.0, 2.0]), np.ones((5, 2)) @ np.diag([1.0, 0.0])
        >>> singular_values(core(b, a)).round(6).tolist()
        [6.708204, 0.0]
    """
    _, right = np.linalg.qr(np.asarray(a, np.float64))
    _, left = np.linalg.qr(np.asarray(b, np.float64))
    return left @ right.swapaxes(-1, -2)


def gram(x: np.ndarray) -> np.ndarray:
    """xᵀx in float64, of shape (…, columns, columns)."""
    x = np.asarray(x, np.float64)
    return x.swapaxes(-1, -2) @ x


def column_cosines(x: np.ndarray) -> Cosines:
    """Cosine similarities of the columns: xᵢᵀxⱼ/(‖xᵢ‖‖xⱼ‖) for all pairs i < j.

    0 for orthogonal columns, whatever their lengths. Columns of zeros have no
    direction and are left out; with fewer than two others all numbers are NaN.

    Args:
        x: (rows, columns).

    Examples:
        >>> column_cosines(np.eye(3))
        Cosines(mean=0.0, std=0.0, largest=0.0)
    """
    products = gram(x)
    lengths = np.sqrt(np.diag(products))
    products, lengths = products[np.ix_(lengths > 0, lengths > 0)], lengths[lengths > 0]
    if len(lengths) < 2:
        return Cosines(np.nan, np.nan, np.nan)
    pairs = np.triu_indices(len(lengths), 1)
    cosines = (products / lengths / lengths[:, None])[pairs]
    return Cosines(
        float(cosines.mean()), float(cosines.std()), float(np.abs(cosines).max())
    )


def principal_angles(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Principal angles between the column spaces of two matrices, in degrees.

    All 0 for the same subspace, whatever its basis; 90 for a direction of one that
    is orthogonal to the other. From sines and cosines together, since a cosine alone
    cannot tell angles below 1e-6 degrees.

    Args:
        x: (rows, p).
        y: (rows, q).

    Returns:
        As many as the smaller of the two ranks, ascending; none where one is zero.

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
    """Orthonormal columns that span those of x, up to the rounding of float32."""
    u, sigma, _ = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
    rounding = x.shape[1] * float(np.finfo(np.float32).eps)
    return u[:, sigma > rounding * sigma[0]]


def largest_weights(b: np.ndarray, a: np.ndarray, count: int = 5) -> list[Weight]:
    """The entries of b aᵀ that are largest in absolute value, largest first.

    The product is formed in blocks of rows, so that memory stays at 64 MiB for any
    model. They are searched for in float32 and returned in float64.

    Args:
        b: (m, r).
        a: (n, r).
        count: how many.

    Examples:
        >>> largest_weights(np.array([[1.0], [-3.0]]), np.array([[1.0], [2.0]]), 1)
        [Weight(row=1, column=1, value=-6.0)]
    """
    b, a = np.asarray(b, np.float64), np.asarray(a, np.float64)
    left, right = b.astype(np.float32), a.astype(np.float32).T
    height = max(1, _BLOCK // (4 * right.shape[1]))
    tops = []
    for row in range(0, len(left), height):
        block = left[row : row + height] @ right
        tops.append(np.maximum(block.max(axis=1), -block.min(axis=1)))
    # The largest entries lie in the rows whose largest entries are largest.
    rows = np.argsort(-np.concatenate(tops), kind="stable")[:count]
    few = b[rows] @ a.T
    order = np.argsort(-np.abs(few), axis=None, kind="stable")[:count]
    places = zip(*np.unravel_index(order, few.shape), strict=True)
    return [Weight(int(rows[i]), int(j), float(few[i, j])) for i, j in places]
