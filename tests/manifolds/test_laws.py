"""The laws of geometry, one table over manifold × dtype × shape.

References are float64 NumPy and SciPy (reference.py), never the code under test.
"""

import contextlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import manifold_lora as ml
from tests.manifolds import reference
from tests.tolerances import BFLOAT16, FLOAT32, FLOAT64, RESIDUAL, SLOPE

# The metric does not enter a retraction, nor the retraction a gradient.
RETRACTIONS = [ml.Stiefel("polar"), ml.Stiefel("qr")]
METRICS = [ml.Stiefel(metric="canonical"), ml.Stiefel(metric="euclidean")]
MANIFOLDS = [
    ml.Stiefel(retraction, metric)
    for retraction in ("polar", "qr")
    for metric in ("canonical", "euclidean")
]
SIZES = [0, 1e-6, 1e-3, 0.3, 0.6, 1.0, 10.0, 100.0]
SHAPES = [(12, 4), (5, 5), (9, 1), (2, 3, 10, 3), (40, 16)]
TOLERANCE = {"float32": FLOAT32, "float64": FLOAT64}


@contextlib.contextmanager
def precision(dtype):
    with jax.enable_x64(dtype == "float64"):
        yield TOLERANCE[dtype]


def case(shape, dtype, seed=0, size=1.0):
    """A point, an ambient vector, and a tangent whose spectral norm is `size`."""
    rng = np.random.default_rng(seed)
    x = reference.each(reference.qr, rng.normal(size=shape))
    z = rng.normal(size=shape)
    w = rng.normal(size=shape)
    v = w - x @ (x.swapaxes(-1, -2) @ w + w.swapaxes(-1, -2) @ x) / 2
    v *= size / np.maximum(np.linalg.norm(v, 2, (-2, -1), keepdims=True), 1e-30)
    return jnp.asarray(x, dtype), jnp.asarray(z, dtype), jnp.asarray(v, dtype)


def close(a, b, tolerance, scale=1.0):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(scale, 1))


def over(manifolds):
    """The table of one law: manifolds × shapes × dtypes."""
    return pytest.mark.parametrize(
        ("manifold", "shape", "dtype"),
        list(itertools.product(manifolds, SHAPES, TOLERANCE)),
        ids=lambda value: str(value).replace(" ", ""),
    )


once = pytest.mark.parametrize("manifold", MANIFOLDS, ids=str)
each_retraction = pytest.mark.parametrize("manifold", RETRACTIONS, ids=str)


@over([ml.Stiefel()])
def test_random_point_and_tangent(manifold, shape, dtype):
    with precision(dtype) as tolerance:
        make = jax.jit(manifold.random_point, static_argnums=(1, 2))
        x = make(jax.random.key(0), shape, dtype)
        v = manifold.random_tangent(jax.random.key(1), x)
        assert x.shape == v.shape == shape and x.dtype == v.dtype == dtype
        assert manifold.residual(x).shape == shape[:-2]
        assert (manifold.residual(x) < max(RESIDUAL, tolerance)).all()
        gram = np.asarray(x, np.float64).swapaxes(-1, -2) @ np.asarray(x, np.float64)
        close(gram, np.broadcast_to(np.eye(shape[-1]), gram.shape), tolerance)
        close(v, reference.each(reference.projection, x, v), tolerance, scale=4)


@over([ml.Stiefel()])
def test_projection_is_the_nearest_tangent(manifold, shape, dtype):
    with precision(dtype) as tolerance:
        x, z, _ = case(shape, dtype)
        p = manifold.project(x, z)
        close(p, reference.each(reference.projection, x, z), tolerance)
        close(manifold.project(x, p), p, tolerance)  # idempotent
        normal = jnp.matmul(x, (z[..., : shape[-1], :] + z[..., : shape[-1], :].mT))
        close(manifold.project(x, normal), 0 * z, tolerance, scale=10)


@over(METRICS)
def test_metric(manifold, shape, dtype):
    with precision(dtype) as tolerance:
        x, z, v = case(shape, dtype)
        u = manifold.project(x, z)
        x64, u64, v64 = (np.asarray(a, np.float64) for a in (x, u, v))
        flat = [a.reshape(-1, *shape[-2:]) for a in (x64, u64, v64)]
        expected = [
            reference.inner(p, a, b, manifold.metric)
            for p, a, b in zip(*flat, strict=True)
        ]
        scale = 4 * shape[-2] * shape[-1]
        close(manifold.inner(x, u, v).ravel(), expected, tolerance, scale)
        close(manifold.inner(x, u, v), manifold.inner(x, v, u), tolerance, scale)
        if shape != (1, 1) and shape[-2:] != (1, 1):
            assert (manifold.inner(x, u, u) > 0).all()
        close(manifold.norm(x, u) ** 2, manifold.inner(x, u, u), tolerance, scale)


@over(METRICS)
def test_gradient_is_the_metric_dual_of_the_differential(manifold, shape, dtype):
    with precision(dtype) as tolerance:
        x, z, v = case(shape, dtype)

        def f(x):
            return jnp.sum(jnp.sin(x * z) + x * z, axis=(-2, -1))

        gradient = manifold.riemannian_gradient(x, jax.grad(lambda x: f(x).sum())(x))
        differential = jax.jvp(f, (x,), (v,))[1]
        scale = 4 * shape[-2] * shape[-1]
        close(manifold.inner(x, gradient, v), differential, tolerance, scale)
        close(manifold.project(x, gradient), gradient, tolerance, scale=10)


@over(RETRACTIONS)
def test_retraction_reaches_the_right_point(manifold, shape, dtype):
    with precision(dtype) as tolerance:
        cases = [case(shape, dtype, size=size) for size in SIZES]
        x, v = (jnp.stack([c[i] for c in cases]) for i in (0, 2))
        y = jax.jit(manifold.retract)(x, v)
        assert y.shape == x.shape and y.dtype == dtype
        assert (manifold.residual(y) < max(RESIDUAL, tolerance)).all()
        np.testing.assert_array_equal(y[0], x[0])
        factor = reference.RETRACTIONS[manifold.retraction]
        expected = reference.each(factor, np.float64(x) + np.float64(v))
        # X + v is known to ε‖v‖ only, and the smallest singular value stays near 1.
        for got, want, size in zip(y, expected, SIZES, strict=True):
            close(got, want, tolerance, scale=2 * size)


@each_retraction
@pytest.mark.parametrize("shape", [(20, 4), (6, 6)])
def test_huge_steps_stay_on_the_manifold(manifold, shape):
    x, _, v = case(shape, "float32", size=1e3)
    y = manifold.retract(x, v)
    assert manifold.residual(y) < RESIDUAL
    with precision("float64"):
        x, _, v = case(shape, "float64", size=1e3)
        factor = reference.RETRACTIONS[manifold.retraction]
        expected = reference.each(factor, np.asarray(x) + np.asarray(v))
        close(manifold.retract(x, v), expected, FLOAT64, scale=1e4)


@each_retraction
def test_rank_one_tangent(manifold):
    with precision("float64"):
        x, _, _ = case((20, 5), "float64")
        g = jnp.outer(jnp.arange(20.0), jnp.arange(1.0, 6.0))
        v = manifold.project(x, g)
        factor = reference.RETRACTIONS[manifold.retraction]
        expected = reference.each(factor, np.asarray(x) + np.asarray(v))
        close(manifold.retract(x, v), expected, FLOAT64, scale=1e3)


def slope(errors, steps):
    return np.polyfit(np.log(steps), np.log(errors), 1)[0]


def retract_by(manifold, x, v, steps):
    """R(x, t·v) for all steps t at once."""
    v = jnp.asarray(steps)[:, None, None] * v
    return np.asarray(jax.jit(manifold.retract)(jnp.broadcast_to(x, v.shape), v))


# Against the geodesic of each metric: t³ where the retraction is second order, t²
# where it is not. A wrong label fails either way.
ORDERS = {
    ("polar", "euclidean"): 3,
    ("polar", "canonical"): 2,
    ("qr", "euclidean"): 2,
    ("qr", "canonical"): 2,
}


@once
def test_order_of_the_retraction(manifold):
    with precision("float64"):
        x, _, v = case((7, 3), "float64")
        steps = np.geomspace(1e-3, 1e-1, 6)
        exact = [
            reference.geodesic(np.asarray(x), np.asarray(v), t, manifold.metric)
            for t in steps
        ]
        reached = retract_by(manifold, x, v, steps)
        errors = np.linalg.norm(reached - np.stack(exact), axis=(-2, -1))
        order = ORDERS[manifold.retraction, manifold.metric]
        assert abs(slope(errors, steps) - order) < SLOPE


@each_retraction
def test_first_order_defect_has_slope_two_through_zero(manifold):
    with precision("float64"):
        x, _, v = case((8, 3), "float64")
        steps = np.geomspace(1e-4, 1e-1, 6)
        for sign in (1, -1):
            linear = x + sign * steps[:, None, None] * v
            reached = retract_by(manifold, x, sign * v, steps)
            errors = np.linalg.norm(reached - linear, axis=(-2, -1))
            assert abs(slope(errors, steps) - 2) < SLOPE


@over([ml.Stiefel()])
def test_transport(manifold, shape, dtype):
    with precision(dtype) as tolerance:
        x, z, v = case(shape, dtype)
        w = manifold.project(x, z)
        y = jax.jit(manifold.retract)(x, v)
        moved = manifold.transport(x, y, w)
        close(moved, reference.each(reference.projection, y, w), tolerance)
        close(manifold.transport(x, x, w), w, tolerance)
        assert (jnp.linalg.norm(moved) <= jnp.linalg.norm(w) * (1 + tolerance)).all()
        close(manifold.transport(x, y, 2 * w + v), 2 * moved + manifold.project(y, v),
              tolerance, scale=10)  # fmt: skip


@once
def test_left_orthogonal_equivariance(manifold):
    with precision("float64"):
        x, z, v = case((9, 3), "float64")
        q = ml.Stiefel().random_point(jax.random.key(7), (9, 9), "float64")
        close(manifold.retract(q @ x, q @ v), q @ manifold.retract(x, v), FLOAT64, 10)
        gradient = manifold.riemannian_gradient
        close(gradient(q @ x, q @ z), q @ gradient(x, z), FLOAT64, 10)


@each_retraction
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_batch_is_a_loop_and_jit_and_vmap(manifold, dtype):
    with precision(dtype) as tolerance:
        x, z, v = case((6, 10, 3), dtype, size=2)
        for f, vector in [
            (manifold.retract, v),
            (manifold.project, z),
            (manifold.riemannian_gradient, z),
        ]:
            f = jax.jit(f)
            stacked = f(x, vector)
            loop = jnp.stack([f(x[i], vector[i]) for i in range(6)])
            close(loop, stacked, tolerance)
            close(jax.vmap(f)(x, vector), stacked, tolerance)


@each_retraction
def test_retraction_is_differentiable(manifold):
    with precision("float64"):
        x, z, v = case((7, 3), "float64", size=0.4)
        w = manifold.project(x, z)
        retract = jax.jit(lambda v: manifold.retract(x, v))
        _, derivative = jax.jvp(retract, (v,), (w,))
        h = 1e-6
        difference = (retract(v + h * w) - retract(v - h * w)) / (2 * h)
        close(derivative, difference, 1e-8)


@each_retraction
def test_drift_is_repaired(manifold):
    x, z, v = case((50, 8), "float32", size=1e-3)
    drifted = x + 1e-3 * z
    assert manifold.residual(drifted) > 1e-4
    assert manifold.residual(manifold.retract(drifted, v)) < RESIDUAL


@each_retraction
def test_bfloat16_points_are_computed_in_float32(manifold):
    x, _, v = case((64, 4), "float32")
    x, v = x.astype(jnp.bfloat16), v.astype(jnp.bfloat16)
    y = manifold.retract(x, v)
    assert y.dtype == jnp.bfloat16
    wide = manifold.retract(x.astype(jnp.float32), v.astype(jnp.float32))
    np.testing.assert_array_equal(y, wide.astype(jnp.bfloat16))
    assert manifold.residual(y) < BFLOAT16


@each_retraction
def test_two_thousand_float32_steps(manifold):
    x, _, _ = case((2, 64, 8), "float32")

    def step(x, key):
        size = 10.0 ** jax.random.uniform(key, minval=-4, maxval=1.5)
        v = manifold.random_tangent(key, x)
        x = manifold.retract(x, manifold.project(x, size * v / 10))
        return x, manifold.residual(x).max()

    keys = jax.random.split(jax.random.key(1), 2000)
    _, residuals = jax.jit(lambda x, keys: jax.lax.scan(step, x, keys))(x, keys)
    assert residuals.max() < RESIDUAL


@pytest.mark.parametrize("shape", [(30, 5), (4, 6, 6)])
def test_nearest_point(shape):
    with precision("float64"):
        z = jax.random.normal(jax.random.key(3), shape, "float64")
        expected = reference.each(reference.polar, z)
        close(jax.jit(ml.Stiefel().nearest_point)(z), expected, FLOAT64, scale=100)


def test_random_points_are_uniform():
    x = ml.Stiefel().random_point(jax.random.key(0), (20000, 3, 2))
    # Haar measure: mean 0, E[xᵢⱼ²] = 1/n, and E[x₁₁² x₂₂²] from its Weingarten sum.
    x = np.asarray(x, np.float64)
    close(x.mean(0), np.zeros((3, 2)), 0.02)
    close((x**2).mean(0), np.full((3, 2), 1 / 3), 0.01)
    close((x[:, 0, 0] ** 2 * x[:, 1, 1] ** 2).mean(), 4 / 30, 0.01)


def test_no_lapack_call_in_any_map():
    for manifold in MANIFOLDS:
        x, _, v = case((2, 12, 4), "float32")
        for f in (manifold.retract, manifold.project, manifold.riemannian_gradient):
            text = jax.jit(f).lower(x, v).as_text()
            assert "custom_call" not in text
        make = jax.jit(lambda key, m=manifold: m.random_point(key, (12, 4)))
        assert "lapack" not in make.lower(jax.random.key(0)).as_text()


def test_forty_leaves_in_one_program():
    manifold = ml.Stiefel("qr")
    points = {i: case((2, 32, 4), "float32", seed=i)[0] for i in range(40)}
    step = jax.jit(lambda t: jax.tree.map(lambda x: manifold.retract(x, x * 0), t))
    for i, y in step(points).items():
        np.testing.assert_array_equal(y, points[i])


def test_precision_is_high_whatever_the_default():
    # CPU runs everything in float32, so look at what is asked of the compiler.
    manifold = ml.Stiefel()
    x, _, v = case((12, 4), "float32")
    with jax.default_matmul_precision("bfloat16"):
        text = jax.jit(manifold.retract).lower(x, v).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert products and all("HIGHEST" in line for line in products)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ml.Stiefel("ploar"), "Did you mean polar"),  # pyright: ignore
        (lambda: ml.Stiefel(metric="flat"), "canonical, euclidean"),  # pyright: ignore
        (lambda: ml.Stiefel().check_shape((3, 4)), "rows ≥ columns"),
        (lambda: ml.Stiefel().check_shape((4,)), "rows, columns"),
        (lambda: ml.Stiefel().random_point(jax.random.key(0), (3, 4)), "rows ≥"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ml.InputError, match=message):
        make()


def test_euclidean_is_flat():
    flat = ml.Euclidean()
    x = flat.random_point(jax.random.key(0), (2, 4, 3))
    v = flat.random_tangent(jax.random.key(1), x)
    np.testing.assert_array_equal(flat.retract(x, v), x + v)
    np.testing.assert_array_equal(flat.project(x, v), v)
    np.testing.assert_array_equal(flat.riemannian_gradient(x, v), v)
    np.testing.assert_array_equal(flat.transport(x, x + v, v), v)
    close(flat.inner(x, v, v), np.square(v).sum((-2, -1)), FLOAT32, scale=10)
    assert flat.residual(x).shape == (2,) and not flat.residual(x).any()
    assert hash(flat) == hash(ml.Euclidean())
