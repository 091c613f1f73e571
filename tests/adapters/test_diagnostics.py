"""Ranks, cosines, angles and entries against closed forms, SciPy and full products."""

import itertools
import math
import tracemalloc

import numpy as np
import pytest
import scipy.linalg

from manifold_lora.adapters import diagnostics
from manifold_lora.adapters.diagnostics import (
    Cosines,
    MatrixEntry,
    column_cosines,
    compressed_product,
    effective_rank,
    gram,
    largest_entries,
    numerical_rank,
    principal_angles,
    singular_values,
    stable_rank,
)
from tests.tolerances import EFFECTIVE_RANK, FLOAT32, FLOAT64


def orthonormal(rng, rows, columns):
    return np.linalg.qr(rng.normal(size=(rows, columns)))[0]


def with_values(rng, rows, values):
    """A (rows, r) matrix with the given singular values."""
    r = len(values)
    return orthonormal(rng, rows, r) * np.asarray(values) @ orthonormal(rng, r, r)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


# Singular values, their entropy effective rank, stable rank and numerical rank.
SPECTRA = {
    "orthonormal": ([1, 1, 1, 1], 4, 4, 4),
    "one": ([7], 1, 1, 1),
    "half": ([2, 1, 1], 2**1.5, 6 / 4, 3),  # p = 1/2, 1/4, 1/4
    "three quarters": ([3, 1], 4 / 3**0.75, 10 / 9, 2),
    "one dominates": ([1e5, 1], 1, 1, 1),
    "deficient": ([3, 3, 0], 2, 2, 2),
    "zero": ([0, 0], 0, 0, 0),
}


@pytest.mark.parametrize("name", SPECTRA)
def test_ranks_of_known_spectra(rng, name):
    values, effective, stable, numerical = SPECTRA[name]
    x = with_values(rng, 9, values)
    np.testing.assert_allclose(singular_values(x), values, rtol=FLOAT64, atol=FLOAT64)
    near = EFFECTIVE_RANK if name == "one dominates" else FLOAT64
    assert effective_rank(x) == pytest.approx(effective, rel=near)
    assert stable_rank(x) == pytest.approx(stable, rel=near)
    assert numerical_rank(x) == numerical


def test_numerical_rank_counts_values_above_the_threshold(rng):
    x = with_values(rng, 6, [10, 1, 0.11, 0.09])
    assert numerical_rank(x) == 3
    assert numerical_rank(x, threshold=0.05) == 2


def test_leading_axes_are_batch_axes(rng):
    x = rng.normal(size=(2, 3, 7, 4))
    for measure in (effective_rank, stable_rank, numerical_rank, singular_values):
        batched = measure(x)
        for i, j in np.ndindex(2, 3):
            np.testing.assert_allclose(batched[i, j], measure(x[i, j]), rtol=FLOAT64)


def test_float32_is_measured_in_float64(rng):
    x = with_values(rng, 50, [1, 1e-6]).astype(np.float32)
    expected = np.linalg.svd(x.astype(np.float64), compute_uv=False)
    np.testing.assert_array_equal(singular_values(x), expected)


@pytest.mark.parametrize("m, n, r", [(9, 7, 4), (9, 3, 5), (2, 3, 5)])
def test_compressed_product_has_the_singular_values_of_the_product(rng, m, n, r):
    b, a = rng.normal(size=(m, r)), rng.normal(size=(n, r))
    full = np.linalg.svd(b @ a.T, compute_uv=False)
    small = compressed_product(b, a)
    assert small.shape == (min(m, r), min(n, r))
    rank = min(m, n, r)
    np.testing.assert_allclose(singular_values(small)[:rank], full[:rank], rtol=FLOAT64)


def test_cosines_of_known_angles():
    x = np.array([[1, 3 * math.cos(math.pi / 3)], [0, 3 * math.sin(math.pi / 3)]])
    np.testing.assert_allclose(column_cosines(x), (0.5, 0, 0.5), atol=FLOAT64)
    x = np.array([[1.0, -2, 0], [0, 0, 1]])  # cosines −1, 0, 0
    expected = (-1 / 3, math.sqrt(2) / 3, 1)
    np.testing.assert_allclose(column_cosines(x), expected, atol=FLOAT64)


def test_cosines_are_those_of_all_pairs(rng):
    x = rng.normal(size=(8, 5)) * [1, 10, 1e-3, 5, 2]
    pairs = [
        x[:, i] @ x[:, j] / np.linalg.norm(x[:, i]) / np.linalg.norm(x[:, j])
        for i, j in itertools.combinations(range(5), 2)
    ]
    expected = (np.mean(pairs), np.std(pairs), np.max(np.abs(pairs)))
    np.testing.assert_allclose(column_cosines(x), expected, rtol=FLOAT64)
    np.testing.assert_allclose(gram(x), x.T @ x)


def test_zero_columns_are_ignored(rng):
    x = rng.normal(size=(8, 3))
    assert column_cosines(np.insert(x, 1, 0, axis=1)) == column_cosines(x)
    for few in (x[:, :1], np.zeros((8, 3)), np.insert(x[:, :1], 0, 0, axis=1)):
        assert np.isnan(column_cosines(few)).all()
    assert isinstance(column_cosines(x), Cosines)


@pytest.mark.parametrize("degrees", [0, 1e-9, 30, 89.999, 90])
def test_a_plane_turned_by_a_known_angle(rng, degrees):
    basis = orthonormal(rng, 10, 4)
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x = basis[:, :2]
    y = np.stack([basis[:, 0], c * basis[:, 1] + s * basis[:, 2]], axis=1)
    y = y @ [[2.0, 1], [1, 3]]  # another basis of the same plane
    np.testing.assert_allclose(
        principal_angles(x, y), [0, degrees], atol=math.degrees(FLOAT64)
    )


@pytest.mark.parametrize("p, q", [(3, 3), (2, 5), (5, 2)])
def test_angles_agree_with_scipy(rng, p, q):
    x, y = rng.normal(size=(12, p)), rng.normal(size=(12, q))
    expected = np.degrees(scipy.linalg.subspace_angles(x, y))[::-1]
    np.testing.assert_allclose(
        principal_angles(x, y), expected, atol=math.degrees(FLOAT64)
    )


def test_angles_of_a_rank_deficient_factor_use_its_column_space(rng):
    x, y = rng.normal(size=(9, 3)), rng.normal(size=(9, 4))
    wide = np.concatenate([x, x[:, :1] - x[:, 1:2], np.zeros((9, 1))], axis=1)
    wide = wide.astype(np.float32)
    np.testing.assert_allclose(
        principal_angles(wide, y), principal_angles(x, y), atol=90 * FLOAT32
    )
    assert principal_angles(np.zeros((9, 2)), y).size == 0


@pytest.mark.parametrize("block", [64, 4 * 11 * 3, 2**20])
def test_largest_entries_agree_with_the_full_product(rng, monkeypatch, block):
    monkeypatch.setattr(diagnostics, "_BLOCK", block)
    b, a = rng.normal(size=(17, 3)), rng.normal(size=(11, 3))
    full = b @ a.T
    order = np.argsort(-np.abs(full), axis=None)[:5]
    expected = [(*divmod(int(i), 11), full.flat[i]) for i in order]
    entries = largest_entries(b, a)
    assert [w[:2] for w in entries] == [w[:2] for w in expected]
    np.testing.assert_allclose([w.value for w in entries], [w[2] for w in expected])


def test_largest_entries_of_small_and_zero_products():
    one = largest_entries(np.array([[2.0]]), np.array([[-3.0]]))
    assert one == [MatrixEntry(0, 0, -6.0)]
    assert [w.value for w in largest_entries(np.zeros((3, 2)), np.ones((4, 2)), 2)] == [
        0,
        0,
    ]


def test_largest_entries_do_not_form_the_full_product(rng, monkeypatch):
    monkeypatch.setattr(diagnostics, "_BLOCK", 2**20)
    b, a = rng.normal(size=(3000, 4)), rng.normal(size=(3000, 4))
    tracemalloc.start()
    largest_entries(b, a)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * 2**20  # the product in float32 is 34 MiB
