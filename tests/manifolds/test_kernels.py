"""The small-matrix kernels against NumPy and SciPy in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from manifold_lora.manifolds import linalg
from tests.manifolds.reference import each
from tests.tolerances import FLOAT32, FLOAT64

TOLERANCE = {"float32": FLOAT32, "float64": FLOAT64}
GRAM = 1e-7  # XᵀX of unit columns in float32, whatever their length

both = pytest.mark.parametrize("dtype", ["float32", "float64"])


def run(kernel, dtype, *arrays):
    """The jitted kernel on arrays of that dtype, and those arrays in float64."""
    with jax.enable_x64(dtype == "float64"):
        arrays = [jnp.asarray(a, dtype) for a in arrays]
        out = np.asarray(jax.jit(kernel)(*arrays), np.float64)
        return out, *(np.asarray(a, np.float64) for a in arrays)


def relative(got, want):
    """The largest error of any matrix, relative to its norm."""
    norm = functools.partial(np.linalg.norm, axis=(-2, -1))
    return (norm(got - want) / np.maximum(norm(want), 1)).max()


@both
def test_inverse(dtype):
    rng = np.random.default_rng(0)
    a = rng.normal(size=(5, 8, 8)) + 4 * np.eye(8)
    a[1] = np.eye(8)
    a[2] = np.eye(8)[::-1]  # nothing but pivots
    a[3] = np.triu(rng.normal(size=(8, 8)), 1) + np.diag(np.geomspace(1e-2, 1e2, 8))
    a[4, :4, :4] = 0  # leading block singular
    got, a = run(linalg.inverse, dtype, a)
    cond = np.linalg.cond(a).max()
    assert relative(got, np.linalg.inv(a)) < TOLERANCE[dtype] * cond
    assert relative(got[[0, 2, 4]], np.linalg.inv(a[[0, 2, 4]])) < 20 * TOLERANCE[dtype]
    np.testing.assert_array_equal(got[1], np.eye(8))
    np.testing.assert_array_equal(got[2], a[2])


def test_inverse_pivots():
    # A tiny leading entry: without pivoting 1/1e-12 swamps everything.
    a = np.array([[1e-12, 1.0], [1.0, 1.0]])
    got, a = run(linalg.inverse, "float32", a)
    assert relative(got, np.linalg.inv(a)) < FLOAT32


@both
def test_lyapunov(dtype):
    rng = np.random.default_rng(1)
    skew = rng.normal(size=(4, 6, 6))
    a = skew - skew.mT + np.diag(np.linspace(1, 3, 6))
    a[2] *= 100
    a[3] = np.diag(np.geomspace(1e-2, 1e2, 6))
    q = rng.normal(size=(4, 6, 6))
    got, a, q = run(linalg.lyapunov, dtype, a, q)
    want = each(scipy.linalg.solve_continuous_lyapunov, a, q)
    assert relative(got, want) < 100 * TOLERANCE[dtype]


@both
def test_expm(dtype):
    rng = np.random.default_rng(2)
    skew = rng.normal(size=(8, 6, 6))
    a = (skew - skew.mT) / np.linalg.norm(skew - skew.mT, axis=(1, 2), keepdims=True)
    sizes = [0, 1e-4, 0.3, 1, 10, 100, 1000]
    a[:7] *= np.reshape(sizes, (7, 1, 1))
    a[7] = 3 * skew[7] / np.linalg.norm(skew[7])  # not skew
    got, a = run(linalg.expm, dtype, a)
    want = each(scipy.linalg.expm, a)
    np.testing.assert_array_equal(got[0], np.eye(6))
    for i, size in enumerate([*sizes, 3]):  # squaring makes ε into ε‖A‖
        assert relative(got[i], want[i]) < TOLERANCE[dtype] * max(size, 1)


@both
def test_inverse_root_and_inverse_cholesky(dtype):
    rng = np.random.default_rng(3)
    v = rng.normal(size=(7, 9, 5))
    v /= np.linalg.norm(v, 2, (1, 2), keepdims=True)
    v *= np.reshape([0, 1e-4, 0.1, 0.7, 3, 30, 1000], (7, 1, 1))
    e = v.mT @ v
    eye = np.eye(5)
    got, e64 = run(linalg.inverse_root, dtype, e)
    values, q = np.linalg.eigh(eye + e64)
    want = (q / np.sqrt(values)[:, None, :]) @ q.mT - eye
    scale = np.linalg.cond(eye + e64)  # the effect of rounding E alone
    errors = np.linalg.norm(got - want, axis=(1, 2)) / scale
    assert errors.max() < TOLERANCE[dtype]
    np.testing.assert_array_equal(got[0], 0 * eye)
    got, _ = run(linalg.inverse_cholesky, dtype, e)
    want = np.linalg.inv(np.linalg.cholesky(eye + e64).mT) - eye
    errors = np.linalg.norm(got - want, axis=(1, 2)) / scale
    assert errors.max() < TOLERANCE[dtype]
    np.testing.assert_array_equal(got[0], 0 * eye)
    np.testing.assert_array_equal(got, np.triu(got))


@pytest.mark.parametrize("rows", [40, 4096, 14336, 14337])
def test_deviation(rows):
    rng = np.random.default_rng(4)
    x = np.linalg.qr(rng.normal(size=(rows, 4)))[0]
    x[:, 3] = np.arange(rows) == 5  # a sparse column
    got, x = run(linalg.deviation, "float32", x)
    assert np.abs(got - (x.T @ x - np.eye(4))).max() < GRAM * (2 if rows % 64 else 1)


@pytest.mark.parametrize("r", [1, 7, 64, 100])
def test_times_is_the_product(r):
    rng = np.random.default_rng(5)
    x, s = rng.normal(size=(2, 30, r)), rng.normal(size=(2, r, 5))
    got, x, s = run(linalg.times, "float32", x, s)
    assert relative(got, x @ s) < FLOAT32
    np.testing.assert_allclose(got, run(linalg.matmul, "float32", x, s)[0], atol=1e-4)


def test_stacked_preserves_order_and_calls_once_per_shape():
    calls = []

    def kernel(a, b):
        calls.append(a.shape)
        return a + 2 * b

    arrays = [jnp.full(s, float(i)) for i, s in enumerate([(2, 2), (3, 3)] * 2)]
    arrays.append(jnp.ones((4, 2, 2)))
    out = linalg.stacked(kernel, arrays, arrays)
    assert calls == [(2, 2, 2), (2, 3, 3), (4, 2, 2)]
    for got, a in zip(out, arrays, strict=True):
        np.testing.assert_array_equal(got, 3 * a)
