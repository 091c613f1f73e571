"""Rank truncation against dense singular value decompositions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from manifold_lora.errors import InputError
from manifold_lora.manifolds.truncation import truncate
from tests.manifolds import reference_bounded_rank as reference
from tests.tolerances import FLOAT32, FLOAT64, RESIDUAL

RANK = 4
# Of two batch entries: one keeps three, the other one, at a threshold of 0.1.
VALUES = np.array([[3.0, 0.5, 0.1001, 0.0999], [0.4, 0.09, 1e-3, 0.0]])


def orthonormal(rng, rows, rank=RANK, batch=(2,)):
    return np.linalg.qr(rng.normal(size=(*batch, rows, rank)))[0]


def points(values=VALUES, dtype="float64"):
    """The same singular values as a bounded and as a fixed rank point."""
    rng = np.random.default_rng(0)
    batch, rank = values.shape[:-1], values.shape[-1]
    left, right = (orthonormal(rng, rank, rank, batch) for _ in range(2))
    s = left * values[..., None, :] @ right.swapaxes(-1, -2)
    u, v = orthonormal(rng, 9, rank, batch), orthonormal(rng, 7, rank, batch)
    for point in ({"a": u @ s, "v": v}, {"u": u, "s": s, "v": v}):
        yield {k: jnp.asarray(x, dtype) for k, x in point.items()}


def dense(point):
    p = {k: np.asarray(x, np.float64) for k, x in point.items()}
    return (p["a"] if "a" in p else p["u"] @ p["s"]) @ p["v"].swapaxes(-1, -2)


def off(x):
    x = np.asarray(x, np.float64)
    return np.abs(x.swapaxes(-1, -2) @ x - np.eye(x.shape[-1])).max()


@pytest.mark.parametrize("kind", [0, 1], ids=["bounded", "fixed"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_truncation_keeps_what_is_above_the_threshold(kind, dtype):
    tolerance = {"float64": FLOAT64, "float32": FLOAT32}[dtype]
    with jax.enable_x64(dtype == "float64"):
        x = list(points(dtype=dtype))[kind]
        y, energy = truncate(x, 0.1)
        assert set(y) == set(x) and all(y[k].dtype == x[k].dtype for k in y)
        assert y["v"].shape == (2, 7, 3)
        assert energy.dtype == dtype and energy.shape == (2,)
        u, s, vt = np.linalg.svd(dense(x), full_matrices=False)
        kept = u * np.where(s >= 0.1, s, 0)[:, None, :] @ vt
        np.testing.assert_allclose(dense(y), kept, rtol=0, atol=4 * tolerance)
        dropped = np.where(VALUES < 0.1, VALUES**2, 0).sum(-1)
        np.testing.assert_allclose(energy, dropped, rtol=0, atol=tolerance)
        lost = np.sum((dense(x) - dense(y)) ** 2, (-2, -1))
        np.testing.assert_allclose(energy, lost, rtol=0, atol=4 * tolerance)
        for part in set(y) & {"u", "v"}:
            assert off(y[part]) < max(RESIDUAL, tolerance)
        # The second entry keeps one: exact zeros beside it.
        padded = y["a"][1, :, 1:] if kind == 0 else y["s"][1, 1:]
        assert not np.asarray(padded).any()


def test_nothing_is_dropped_at_zero_and_one_column_is_left_at_infinity():
    with jax.enable_x64(True):
        for x in points():
            y, energy = truncate(x, 0)
            assert y["v"].shape == x["v"].shape and not energy.any()
            np.testing.assert_allclose(dense(y), dense(x), rtol=0, atol=FLOAT64)
            y, energy = truncate(x, float("inf"))
            assert y["v"].shape == (2, 7, 1) and not dense(y).any()
            np.testing.assert_allclose(energy, (VALUES**2).sum(-1), atol=FLOAT64)


def test_a_single_matrix_and_ties_and_zero():
    with jax.enable_x64(True):
        for x in points(np.array([2.0, 1.0, 1.0])):
            y, energy = truncate(x, 1.5)
            assert y["v"].shape == (7, 1) and energy.shape == ()
            np.testing.assert_allclose(energy, 2, rtol=0, atol=FLOAT64)
        for x in points(np.zeros(3)):
            y, energy = truncate(x, 1e-3)
            assert energy == 0 and y["v"].shape == (7, 1) and off(y["v"]) < FLOAT64


def test_bfloat16_and_a_wide_factor():
    rng = np.random.default_rng(1)
    x = reference.draw(rng, (2, 5, 3))  # rank 2 at most, in three columns
    y, _ = truncate({k: jnp.asarray(p, "bfloat16") for k, p in x.items()}, 1e-6)
    assert y["a"].shape == (2, 2) and y["v"].dtype == jnp.bfloat16


def test_a_mutant_that_compares_squares_is_caught(monkeypatch):
    svd = np.linalg.svd

    def squares(*args):
        u, s, vt = svd(*args)
        return u, s**2, vt

    monkeypatch.setattr(np.linalg, "svd", squares)
    with jax.enable_x64(True):
        y, energy = truncate(next(points()), 0.1)
        dropped = np.where(VALUES < 0.1, VALUES**2, 0).sum(-1)
        assert y["v"].shape != (2, 7, 3) and not np.allclose(energy, dropped)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: truncate(x["v"], 0.1), "got ArrayImpl"),
        (lambda x: truncate({"a": x}, 0.1), r"got \['a'\]"),
        (lambda x: truncate(x, -1e-3), "≥ 0, got -0.001"),
        (lambda x: truncate(x, float("nan")), "≥ 0, got nan"),
        (lambda x: jax.jit(lambda x: truncate(x, 0.1))(x), "outside"),
        (lambda x: jax.jit(lambda t: truncate(x, t)[1])(0.1), "outside"),
        (
            lambda x: truncate(x | {"a": x["a"] * np.nan}, 0.1),
            "NaN or infinite numbers in a",
        ),
    ],
)
def test_bad_input(call, message):
    x = next(points(dtype="float32"))
    with pytest.raises(InputError, match=message):
        call(x)
