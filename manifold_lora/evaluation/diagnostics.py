"""Numbers that describe a factor."""

import numpy as np


def effective_rank(x: np.ndarray) -> np.ndarray:
    """Entropy effective rank exp(−Σ p log p), p = σ/Σσ, one number a batch entry.

    r for orthonormal columns; near 1 where one direction has taken over.

    Args:
        x: (…, rows, columns).

    References:
        Roy & Vetterli, "The effective rank", 2007.

    Examples:
        >>> float(effective_rank(np.eye(5)[:, :3]).round(6))
        3.0
    """
    sigma = np.linalg.svd(np.asarray(x, np.float64), compute_uv=False)
    p = sigma / np.maximum(sigma.sum(-1, keepdims=True), np.finfo(float).tiny)
    return np.exp(-np.sum(p * np.log(np.where(p > 0, p, 1)), axis=-1))
