"""Tests specific to Stiefel: equivalent formulas, transports, random points."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import manifold_lora as ml
from tests.manifolds import reference
from tests.manifolds.reference import each
from tests.manifolds.table import stiefel_point, stiefel_tangent
from tests.tolerances import FLOAT32, FLOAT64, RESIDUAL

DERIVATIVE = 1e-9  # differentiated transports at ‖η‖ ≤ 2 in float64
NAMES = ("polar", "qr", "cayley", "exp")
SHAPE = (3, 10, 3)


def case(shape, sizes, seed=0):
    """A point, and tangents of these spectral norms, on a new leading axis."""
    rng = np.random.default_rng(seed)
    x = np.stack([stiefel_point(rng, shape)] * len(sizes))
    v = stiefel_tangent(rng, x[0])
    v = v / np.linalg.norm(v, 2, (-2, -1), keepdims=True)
    return x, np.stack([size * v for size in sizes])


def close(a, b, tolerance):
    np.testing.assert_allclose(np.float64(a), np.float64(b), rtol=0, atol=tolerance)


def test_cayley_is_wen_yin_and_the_dense_form():
    with jax.enable_x64(True):
        x, v = case(SHAPE, [1e-3, 1.0, 30.0])
        got = jax.jit(ml.Stiefel("cayley").retract)(x, v)
        close(got, each(reference.wen_yin, x, v), 30 * FLOAT64)
        close(got, each(reference.cayley, x, v), 30 * FLOAT64)


@pytest.mark.parametrize("metric", ["canonical", "euclidean"])
def test_exp_solves_the_geodesic_equation_at_constant_speed(metric):
    manifold = ml.Stiefel("exp", metric)
    with jax.enable_x64(True):
        ts = np.linspace(0.25, 2.0, 8)
        x, v = case((9, 3), ts)

        @jax.jit
        def path(x, v):
            return jax.jvp(lambda t: manifold.retract(x, t * v), (1.0,), (1.0,))

        points, speeds = jax.vmap(path)(x, v)
        integrated = reference.geodesic(x[0], v[0] / ts[0], ts, metric)
        close(points, integrated, 1e-10)
        lengths = [
            reference.inner(np.asarray(y), np.asarray(w), np.asarray(w), metric)
            for y, w in zip(points, speeds / ts[:, None, None], strict=True)
        ]
        close(lengths, np.full(8, lengths[0]), 10 * FLOAT64)
        start = reference.inner(x[0], v[0] / ts[0], v[0] / ts[0], metric)
        close(lengths[0], start, 10 * FLOAT64)


@pytest.mark.parametrize("name", ["polar", "qr"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_fused_step_is_the_retracted_projection(name, dtype):
    manifold = ml.Stiefel(name)
    with jax.enable_x64(dtype == "float64"):
        x, v = case(SHAPE, [0, 1e-4, 0.1, 1.0, 10.0])
        rng = np.random.default_rng(3)
        s = rng.normal(size=(*SHAPE[:-2], 3, 3))
        normal = x[0] @ (s + s.mT)
        normal *= 50 / np.linalg.norm(normal, 2, (-2, -1), keepdims=True)
        # Without a normal part, and with one much larger than the tangent.
        d = jnp.asarray(np.stack([v, v + normal]), dtype)
        x = jnp.asarray(np.stack([x, x]), dtype)
        got = jax.jit(lambda x, d: manifold.step([x], [d])[0])(x, d)
        assert manifold.residual(got).max() < RESIDUAL
        x, d = np.asarray(x, np.float64), np.asarray(d, np.float64)
        tangent = d - x @ (x.mT @ d + d.mT @ x) / 2
        want = each(getattr(reference, name), x + tangent)
        # The normal part is cut off up to ε times its size, in small matrices its
        # square: ε·50² of numbers of size 1.
        tolerance = {"float32": FLOAT32, "float64": FLOAT64}[dtype]
        close(got[0], want[0], 10 * tolerance)
        close(got[1], want[1], 50 * tolerance)


@pytest.mark.parametrize("name", ["polar", "qr"])
def test_differentiated_transport_is_the_jvp(name):
    manifold = ml.Stiefel(name, vector_transport="differentiated")
    with jax.enable_x64(True):
        x, eta = case(SHAPE, [0.0, 1e-3, 0.5, 1.0, 2.0])
        xi = stiefel_tangent(np.random.default_rng(5), x)

        @jax.jit
        def both(x, eta, xi):
            y, derivative = jax.jvp(lambda v: manifold.retract(x, v), (eta,), (xi,))
            return manifold.transport(x, y, xi), derivative

        moved, derivative = both(x, eta, xi)
        close(moved, derivative, DERIVATIVE)
        x, eta = case((4, 4), [0.5, 1.0])
        moved, derivative = both(x, eta, stiefel_tangent(np.random.default_rng(6), x))
        close(moved, derivative, DERIVATIVE)


@pytest.mark.parametrize("name", NAMES)
def test_huge_steps_stay_on_the_manifold(name):
    manifold = ml.Stiefel(name)
    for shape in [(4, 20, 4), (4, 6, 6)]:
        x, v = case(shape, [100.0, 300.0, 1e3])
        y = jax.jit(manifold.retract)(
            jnp.asarray(x, "float32"), jnp.asarray(v, "float32")
        )
        assert manifold.residual(y).max() < RESIDUAL


@pytest.mark.parametrize("name", NAMES)
def test_left_orthogonal_equivariance(name):
    manifold = ml.Stiefel(name)

    @jax.jit
    def maps(x, v, z):
        return manifold.retract(x, v), manifold.riemannian_gradient(x, z)

    with jax.enable_x64(True):
        x, v = case((9, 3), [1.0])
        q, z = stiefel_point(np.random.default_rng(7), (9, 9)), v + x
        turned, kept = maps(q @ x, q @ v, q @ z), maps(x, v, z)
        for a, b in zip(turned, kept, strict=True):
            close(a, q @ b, 10 * FLOAT64)


@pytest.mark.parametrize("shape", [(30, 5), (4, 6, 6)])
def test_nearest_point(shape):
    with jax.enable_x64(True):
        z = np.random.default_rng(3).normal(size=shape)
        got = jax.jit(ml.Stiefel().nearest_point)(z)
        close(got, each(reference.polar, z), 100 * FLOAT64)


def test_penalty_gradient():
    with jax.enable_x64(True):
        x = np.random.default_rng(4).normal(size=(8, 3)) / 3

        def penalty(x):
            return jnp.sum((x.T @ x - jnp.eye(3)) ** 2) / 4

        close(
            ml.Stiefel().penalty_gradient(jnp.asarray(x)), jax.grad(penalty)(x), FLOAT64
        )


def test_random_points_are_uniform():
    x = ml.Stiefel().random_point(jax.random.key(0), (20000, 3, 2))
    # Haar measure: mean 0, E[xᵢⱼ²] = 1/n, and E[x₁₁² x₂₂²] from its Weingarten sum.
    x = np.asarray(x, np.float64)
    close(x.mean(0), np.zeros((3, 2)), 0.02)
    close((x**2).mean(0), np.full((3, 2), 1 / 3), 0.01)
    close((x[:, 0, 0] ** 2 * x[:, 1, 1] ** 2).mean(), 4 / 30, 0.01)


def test_random_square_points():
    x = jax.jit(lambda key: ml.Stiefel().random_point(key, (50, 6, 6)))
    x = x(jax.random.key(0))
    assert ml.Stiefel().residual(x).max() < RESIDUAL


def test_many_leaves_in_one_program():
    # Independent LAPACK calls in one program can hang; products cannot.
    manifold = ml.Stiefel("qr")
    rng = np.random.default_rng(0)
    shapes = [(2, 32, 4), (2, 24, 4)] * 6
    points = [jnp.asarray(stiefel_point(rng, shape), "float32") for shape in shapes]
    step = jax.jit(lambda xs: manifold.step(xs, [0 * x for x in xs]))
    for y, x in zip(step(points), points, strict=True):
        np.testing.assert_array_equal(y, x)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ml.Stiefel("ploar"), "Did you mean polar"),  # pyright: ignore
        (lambda: ml.Stiefel(metric="flat"), "canonical, euclidean"),  # pyright: ignore
        (lambda: ml.Stiefel(vector_transport="cut"), "projection"),  # pyright: ignore
        (lambda: ml.Stiefel("exp", vector_transport="differentiated"), "of 'exp'"),
        (lambda: ml.Stiefel("cayley", vector_transport="differentiated"), "polar, qr"),
        (lambda: ml.Stiefel().check_shape((3, 4)), "rows ≥ columns"),
        (lambda: ml.Stiefel().check_shape((4,)), "rows, columns"),
        (lambda: ml.Stiefel().random_point(jax.random.key(0), (3, 4)), "rows ≥"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ml.InputError, match=message):
        make()
