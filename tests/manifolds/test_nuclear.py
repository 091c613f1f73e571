"""Soft thresholding of singular values against dense decompositions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from manifold_lora.manifolds import nuclear
from manifold_lora.manifolds.bounded_rank import BoundedRank
from tests.manifolds import reference_bounded_rank as reference

# Relative to the largest singular value.
TOLERANCE = {"float32": 2e-6, "float64": 1e-13}
SPECTRA = [
    [1, 0.3, 0.1, 1e-2, 1e-3, 0],
    [1, 0.1 + 1e-6, 0.1, 0.1, 0.1 - 1e-6, 0],  # at the threshold
    [1, 1, 1, 1, 1, 1],
    list(np.geomspace(1, 1e-12, 6)),
    [1e4, 1, 0.1, 0.01, 0, 0],
    [1e-4, 1e-5, 0, 0, 0, 0],
    [0, 0, 0, 0, 0, 0],
]
LEVELS = np.array([0, 1e-6, 1e-4, 1e-3, 0.1, 1, 50])


def matrices(rows=40, dtype="float64"):
    """Every spectrum for every level, and the levels."""
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.normal(size=(n, 6)))[0] for n in (rows, 6))
    a = u * np.array(SPECTRA)[:, None, None, :] @ v.T
    a = np.repeat(a, len(LEVELS), 1)
    return jnp.asarray(a, dtype), jnp.asarray(LEVELS, dtype)


def law(a, levels, shrunk, tolerance):
    """The largest error of any case, relative to that case's largest σ."""
    a, shrunk = np.asarray(a, np.float64), np.asarray(shrunk, np.float64)
    expected = reference.shrunk(a, np.asarray(levels, np.float64)[:, None])
    error = np.linalg.norm(shrunk - expected, 2, (-2, -1))
    assert (error <= tolerance * np.linalg.norm(a, 2, (-2, -1))).all()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_shrink(dtype):
    with jax.enable_x64(dtype == "float64"):
        a, levels = matrices(dtype=dtype)
        shrunk = jax.jit(nuclear.shrink)(a, levels)
        law(a, levels, shrunk, TOLERANCE[dtype])
        assert shrunk.dtype == dtype and not shrunk[-1].any()  # zero stays zero


def test_shrink_of_a_point():
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        x = reference.draw(rng, (2, 4, 6, 5))  # fewer rows than columns
        q = np.linalg.qr(rng.normal(size=(5, 5)))[0]
        shrink = jax.jit(BoundedRank().shrink)
        points = {k: jnp.asarray(p) for k, p in x.items()}
        y = shrink(points, 0.5)
        np.testing.assert_allclose(y["a"], reference.shrunk(x["a"], 0.5), atol=1e-13)
        np.testing.assert_array_equal(y["v"], x["v"])
        turned = shrink({k: p @ q for k, p in points.items()}, 0.5)
        np.testing.assert_allclose(turned["a"], y["a"] @ q, atol=1e-13)


def test_shrink_never_overshoots():
    # The papers' step −λU turns σ < λ into λ − σ: zero is never reached.
    with jax.enable_x64(True):
        a, _ = matrices()
        a = a[0, 0] + 0
        shrink = jax.jit(lambda a: nuclear.shrink(a, 0.03))
        for _ in range(40):
            a = shrink(a)
        assert np.linalg.norm(a, 2) < 1e-14


def test_law_rejects_mutants(monkeypatch):
    def subgradient(a, level):
        u, s, vt = np.linalg.svd(a, full_matrices=False)
        return u * np.abs(s - np.asarray(level)[:, None])[..., None, :] @ vt

    def gram(a, level):  # from the eigenvalues of the float32 AᵀA
        s, v = np.linalg.eigh(reference.t(a) @ a)
        s = np.sqrt(np.maximum(s, 1e-30))
        shrinkage = np.maximum(1 - np.asarray(level)[:, None] / s, 0)
        return a @ (v * shrinkage[..., None, :] @ reference.t(v))

    a, levels = (np.asarray(p) for p in matrices(dtype="float32"))
    for mutant in (subgradient, gram):
        with pytest.raises(AssertionError):
            law(a, levels, mutant(a, levels), TOLERANCE["float32"])
    # The columns of A itself are not an orthonormal basis.
    monkeypatch.setattr(nuclear, "_basis", lambda y: y)
    shrunk = jax.jit(lambda *args: nuclear.shrink(*args))(a, levels)
    with pytest.raises(AssertionError):
        law(a, levels, shrunk, TOLERANCE["float32"])
