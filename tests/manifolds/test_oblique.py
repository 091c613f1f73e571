"""Tests specific to Oblique."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import manifold_lora as ml
from manifold_lora.manifolds.oblique import Oblique
from tests.manifolds import reference
from tests.tolerances import FLOAT64, RESIDUAL

close = np.testing.assert_allclose


def test_penalty_gradient():
    with jax.enable_x64(True):
        x = np.random.default_rng(0).normal(size=(8, 3)) / 3

        def penalty(x):
            return jnp.sum((jnp.sum(x**2, 0) - 1) ** 2) / 4

        got = Oblique().penalty_gradient(jnp.asarray(x))
        close(got, jax.grad(penalty)(x), rtol=0, atol=FLOAT64)


def test_nearest_point():
    with jax.enable_x64(True):
        y = np.random.default_rng(1).normal(size=(2, 9, 5))
        want = reference.unit_columns(y)
        close(Oblique().nearest_point(jnp.asarray(y)), want, rtol=0, atol=FLOAT64)


def test_random_columns_are_uniform():
    x = Oblique().random_point(jax.random.key(0), (20000, 3, 2))
    x = np.asarray(x, np.float64)
    close(x.mean(0), np.zeros((3, 2)), atol=0.02)
    close((x**2).mean(0), np.full((3, 2), 1 / 3), atol=0.01)
    close((x[:, 0, 0] ** 4).mean(), 1 / 5, atol=0.01)  # 3/(n(n + 2))


@pytest.mark.parametrize("retraction", ["normalise", "exp"])
def test_columns_without_a_step_are_unchanged(retraction):
    manifold = Oblique(retraction)
    x = manifold.random_point(jax.random.key(0), (50, 4)) * 1.001
    v = manifold.random_tangent(jax.random.key(1), x).at[:, 2].set(0)
    y = manifold.retract(x, v)
    np.testing.assert_array_equal(y[:, 2], x[:, 2])
    lengths = np.linalg.norm(np.float64(y), axis=0)
    close(np.delete(lengths, 2), np.ones(3), atol=RESIDUAL)


@pytest.mark.parametrize("retraction", ["normalise", "exp"])
def test_one_row(retraction):
    manifold = Oblique(retraction)
    x = jnp.asarray([[1.0, -1.0, 1.0]])  # ±1: nothing is tangent
    v = manifold.project(x, jnp.asarray([[0.3, 2.0, -7.0]]))
    np.testing.assert_array_equal(v, 0 * x)
    np.testing.assert_array_equal(manifold.retract(x, v), x)


def test_parallel_transport_is_the_rotation_of_the_great_circle():
    # Up to nearly opposite points: y = exp(W)x, and exp(W)ξ is the transported ξ.
    manifold = Oblique("exp")
    with jax.enable_x64(True):
        rng = np.random.default_rng(2)
        x = reference.unit_columns(rng.normal(size=(6, 1)))
        v, xi = (reference.sphere_projection(x, rng.normal(size=(6, 1))) for _ in "vw")
        v /= np.linalg.norm(v)
        for angle in (0.0, 1.0, 3.0, np.pi - 1e-4):
            w = angle * (v @ x.T - x @ v.T)
            turn = jax.scipy.linalg.expm(w)
            got = manifold.transport(*map(jnp.asarray, (x, turn @ x, xi)))
            close(got, turn @ xi, rtol=0, atol=1e-10)
        opposite = manifold.transport(*map(jnp.asarray, (x, -x, xi)))
        close(opposite, xi, rtol=0, atol=FLOAT64)


def test_bad_input():
    with pytest.raises(ml.InputError, match="Did you mean normalise"):
        Oblique("normalize")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ml.InputError, match="rows, columns"):
        Oblique().random_point(jax.random.key(0), (4,))
