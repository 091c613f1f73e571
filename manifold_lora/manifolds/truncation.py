"""Rank truncation of a trained update, outside of training steps."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from manifold_lora.errors import InputError

PARTS = ({"u", "s", "v"}, {"a", "v"})


def truncate(
    point: Mapping[str, Array], threshold: float
) -> tuple[dict[str, Array], Array]:
    """Drop the singular values below a threshold, and return the discarded energy.

    For a trained update, before it is exported. The result is the nearest matrix of
    lower rank, with columns in the order of the singular values. The new rank is the
    largest number retained in any batch entry, at least 1; entries that retain fewer
    are padded with exact zeros in A or S, while U and V stay orthonormal.
    During training use `BoundedRank.shrink`, which lowers singular values instead.

    Args:
        point: of FixedRank, {"u": (…, m, r), "s": (…, r, r), "v": (…, n, r)}, or of
            BoundedRank, {"a": (…, m, r), "v": (…, n, r)}.
        threshold: smallest singular value to keep, ≥ 0. It is compared with those
            of the point itself, without the scale of an adapter.

    Returns:
        The point of lower rank, in the dtypes of the old one, and the energy Σσ² of
        what was dropped, of shape (…): ‖ΔW − ΔW⁺‖².

    Raises:
        InputError: for another kind of point, one that is NaN or infinite, a
            negative threshold, or a call under `jit`, where ranks cannot change.

    Examples:
        >>> import jax
        >>> import manifold_lora as ml
        >>> x = ml.BoundedRank().random_point(jax.random.key(0), (64, 48, 4))
        >>> x["a"] = x["a"].at[:, 1:].multiply(1e-3)
        >>> y, energy = ml.truncate(x, threshold=0.1)
        >>> y["a"].shape, bool(energy < 1e-5)
        ((64, 1), True)
    """
    wide = _checked(point, threshold)
    left, s, right = np.linalg.svd(wide["s" if "s" in wide else "a"], False)
    retained = s >= threshold
    rank = max(int(retained.sum(-1).max(initial=0)), 1)
    energy = jnp.asarray(np.where(retained, 0, s**2).sum(-1), point["v"].dtype)
    s = np.where(retained, s, 0)[..., :rank]
    left, right = left[..., :rank], right.swapaxes(-1, -2)[..., :rank]
    new = {"v": np.matmul(wide["v"], right)}
    if "s" in wide:
        new |= {"u": np.matmul(wide["u"], left), "s": s[..., None] * np.eye(rank)}
    else:
        new |= {"a": np.where(s[..., None, :] > 0, left * s[..., None, :], 0)}
    return {k: jnp.asarray(new[k], point[k].dtype) for k in point}, energy


def _checked(point: Any, threshold: Any) -> dict[str, np.ndarray]:
    """The parts in float64; raises `InputError` where they cannot be truncated."""
    if not isinstance(point, Mapping) or set(point) not in PARTS:
        got = sorted(point) if isinstance(point, Mapping) else type(point).__name__
        raise InputError(
            f"truncate needs a point with the parts u, s, v or a, v, got {got}. Give "
            "it one point at a time, such as factors[layer]."
        )
    if any(isinstance(x, Tracer) for x in (*point.values(), threshold)):
        raise InputError(
            "truncate changes shapes, which is not possible in a traced function. Call "
            "it outside of jit, vmap and grad."
        )
    if not threshold >= 0:
        raise InputError(f"truncate needs a threshold ≥ 0, got {threshold!r}.")
    wide = {k: np.asarray(x, np.float64) for k, x in point.items()}
    if bad := [k for k, x in wide.items() if not np.isfinite(x).all()]:
        raise InputError(
            f"truncate got NaN or infinite numbers in {', '.join(bad)}. Take the point "
            "of an earlier checkpoint."
        )
    return wide
