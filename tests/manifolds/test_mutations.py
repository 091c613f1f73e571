"""Mutations of manifolds, each of which must violate a law."""

import dataclasses

import jax.numpy as jnp
import pytest

import manifold_lora as ml
from manifold_lora.manifolds.linalg import inverse
from manifold_lora.manifolds.oblique import Oblique
from tests.manifolds import test_laws as laws
from tests.manifolds.table import ROWS


class WithoutHalf(ml.Stiefel):
    def project(self, x, v):
        return v - x @ (x.mT @ v + v.mT @ x)


class WithoutSigns(ml.Stiefel):
    def retract(self, x, v):
        return jnp.linalg.qr(x + v)[0]


class WrongMetric(ml.Stiefel):
    def riemannian_gradient(self, x, g):
        return self.project(x, g)


class Cayley(ml.Stiefel):
    signs = (-1, 1, -1)

    def retract(self, x, v):
        a = x.mT @ v
        normal = v - x @ a
        n = normal.mT @ normal
        one, two, three = self.signs
        b = inverse(jnp.eye(a.shape[-1], dtype=a.dtype) + one * a / 2 + two * n / 4)
        return x + (v + three * x @ n / 2) @ b


class CayleyWrongRotation(Cayley):
    signs = (1, 1, -1)


class CayleyOffManifold(Cayley):
    signs = (-1, 1, 1)


class MovesAtZero(Oblique):
    def retract(self, x, v):
        return self.nearest_point(x + v)


class ProjectsOnly(Oblique):
    def transport(self, x, y, v):
        return self.project(y, v)


class NotParallel(Oblique):
    def transport(self, x, y, v):
        return super().transport(x, y, v + x * jnp.sum(y * v, -2, keepdims=True))


def mutant(name, manifold, **changes):
    return dataclasses.replace(ROWS[name], manifold=manifold, **changes)


maps = laws.test_projection_metric_gradient_and_transport
reaches = laws.test_retraction_reaches_the_right_point
SQUARE, STACKED = (5, 5), (2, 3, 10, 3)


@pytest.mark.parametrize(
    ("law", "row", "arguments"),
    [
        (maps, mutant("stiefel-polar-euclidean", WithoutHalf()), (SQUARE, "float64")),
        (maps, mutant("stiefel-polar-canonical", WrongMetric()), (SQUARE, "float64")),
        (maps, mutant("oblique-exp", ProjectsOnly("exp")), (STACKED, "float64")),
        (reaches, mutant("stiefel-qr-canonical", WithoutSigns()), (SQUARE, "float64")),
        (reaches, mutant("oblique-normalise", MovesAtZero()), (STACKED, "float32")),
        (
            reaches,
            mutant("stiefel-cayley-canonical", CayleyWrongRotation()),
            (STACKED, "float64"),
        ),
        (
            reaches,
            mutant("stiefel-cayley-canonical", CayleyOffManifold()),
            (STACKED, "float64"),
        ),
    ],
    ids=lambda value: type(value.manifold).__name__ if hasattr(value, "draw") else "",
)
def test_laws_reject_mutants(law, row, arguments):
    with pytest.raises(AssertionError):
        law(row, *arguments)


def test_laws_accept_the_correct_cayley():
    row = mutant("stiefel-cayley-canonical", Cayley())
    reaches(dataclasses.replace(row, sizes=row.sizes[:6] * 2), STACKED, "float64")


@pytest.mark.parametrize("name", ["stiefel-qr-canonical", "stiefel-polar-canonical"])
def test_a_first_order_retraction_labelled_second_is_rejected(name):
    laws.test_order_of_the_retraction(ROWS[name])
    with pytest.raises(AssertionError):
        laws.test_order_of_the_retraction(dataclasses.replace(ROWS[name], order=3))


def test_a_second_order_retraction_labelled_first_is_rejected():
    row = dataclasses.replace(ROWS["oblique-normalise"], order=2)
    with pytest.raises(AssertionError):
        laws.test_order_of_the_retraction(row)
