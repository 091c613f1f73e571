"""Landing against float64 NumPy, and the guarantees of its theory."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import manifold_lora as ml
from manifold_lora.optimizers.landing import landing, spectral_norms
from tests.manifolds import reference
from tests.optimizers.numpy_reference import (
    STEPS,
    TRAJECTORY,
    adam,
    distance,
    least_squares,
    projected,
    sgd,
    train,
    transposed,
)
from tests.tolerances import CONVERGENCE, FLOAT64, RESIDUAL, SLOPE

RATE = 0.03
NORM = 1e-3  # of the spectral norm by squarings
STIEFEL, OBLIQUE = ml.Stiefel(), ml.Oblique()


def gram_error(x, oblique=False):
    """XᵀX − I, or its diagonal only."""
    e = transposed(x) @ x - np.eye(x.shape[-1])
    return e * np.eye(x.shape[-1]) if oblique else e


def residual(x):
    return np.max(np.abs(gram_error(np.float64(x))))


def distance_to_stiefel(x):
    """‖X − P(X)‖ of stacked points."""
    return np.linalg.norm(x - reference.each(reference.polar, x), axis=(-2, -1))


def near(rng, shape, distance):
    """Points UΣVᵀ at that distance from the manifold, by random singular values."""
    q = reference.each(reference.qr, rng.normal(size=shape))
    square = (*shape[:-2], shape[-1], shape[-1])
    v = reference.each(reference.qr, rng.normal(size=square))
    s = rng.normal(size=(*shape[:-2], 1, shape[-1]))
    s = 1 + distance * s / np.linalg.norm(s, axis=-1, keepdims=True)
    return (q * s) @ transposed(v)


def moved(x, g, rate=1.0, **options):
    """One step of landing SGD from x, in float64."""
    with jax.enable_x64(True):

        def step(x, g):
            tx = landing(optax.sgd(rate), STIEFEL, **options)
            return x + tx.update(g, tx.init(x), x)[0]

        return np.asarray(jax.jit(step)(jnp.asarray(x), jnp.asarray(g)))


@pytest.mark.parametrize("manifold", [STIEFEL, OBLIQUE], ids=["stiefel", "oblique"])
def test_penalty_gradient(manifold):
    def penalty(x):
        e = x.mT @ x - jnp.eye(3)
        e = e * jnp.eye(3) if isinstance(manifold, ml.Oblique) else e
        return jnp.sum(e**2) / 4

    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 3)))
        gradient, expected = jax.jit(
            lambda x: (manifold.penalty_gradient(x), jax.grad(penalty)(x))
        )(x)
    np.testing.assert_allclose(gradient, expected, atol=100 * FLOAT64)


def tangent(x, z, oblique):
    return z - x * np.sum(x * z, -2, keepdims=True) if oblique else projected(x, z)


def reference_trajectory(inner, oblique, simultaneous):
    """Equation 3 of the paper, or the same with the penalty at the new point."""
    a, b, w = least_squares()
    inner_a, inner_b = inner(RATE), inner(RATE)
    mu = 1 / 3 if simultaneous else 1 / 2
    points = []
    for k in range(1, STEPS + 1):
        error = b @ transposed(a) - w
        g_a, g = transposed(error) @ b, tangent(b, error @ a, oblique)
        v = tangent(b, inner_b(g, k), oblique)
        y = b if simultaneous else b + v
        a, b = a + inner_a(g_a, k), b + v - mu * y @ gram_error(y, oblique)
        points.append({"a": a, "b": b})
    return points


def trajectory(inner=optax.sgd, simultaneous=False, **options):
    """The least squares problem on both manifolds."""
    with jax.enable_x64(True):
        a, b, w = (jnp.asarray(x) for x in least_squares())

        def loss(p):
            return sum(jnp.sum((q["b"] @ q["a"].mT - w) ** 2) / 2 for q in p.values())

        free = ml.Euclidean()
        tx = landing(
            inner(RATE),
            {"s": {"a": free, "b": STIEFEL}, "o": {"a": free, "b": OBLIQUE}},
            simultaneous=simultaneous,
            max_step=None,
            **options,
        )
        return train(tx, {"s": {"a": a, "b": b}, "o": {"a": a, "b": b}}, loss)


def errors(points, inner=sgd, simultaneous=False):
    """The distance of each manifold's trajectory from the NumPy reference."""
    return [
        distance(points[k], reference_trajectory(inner, k == "o", simultaneous))
        for k in ("s", "o")
    ]


INNER = {"sgd": (optax.sgd, sgd), "adam": (optax.adam, adam)}


@pytest.mark.parametrize("simultaneous", [False, True])
@pytest.mark.parametrize("inner", INNER)
def test_trajectory(inner, simultaneous):
    optax_inner, numpy_inner = INNER[inner]
    points = trajectory(optax_inner, simultaneous)
    assert max(errors(points, numpy_inner, simultaneous)) < TRAJECTORY


def repelled(manifold, x, gradient=ml.Stiefel.penalty_gradient):
    return -gradient(manifold, x)


def test_trajectory_detects_an_attraction_of_the_wrong_sign(monkeypatch):
    monkeypatch.setattr(ml.Stiefel, "penalty_gradient", repelled)
    assert not errors(trajectory())[0] < 1e-3


def test_trajectory_detects_a_projection_without_sym(monkeypatch):
    monkeypatch.setattr("manifold_lora.manifolds.stiefel.sym", lambda a: a)
    assert not errors(trajectory())[0] < 1e-3


def test_trajectory_detects_the_penalty_at_the_old_point():
    points = trajectory(simultaneous=True, attraction=0.5)
    assert min(errors(points)) > 1e-3


def test_lemmas_2_and_4():
    rng = np.random.default_rng(0)
    x = near(rng, (300, 9, 3), rng.uniform(0, 1 / 8, size=(300, 1, 1)))
    g = rng.normal(size=x.shape) * rng.uniform(0, 0.1, size=(300, 1, 1))
    rests = g * (np.arange(300) % 2)[:, None, None]  # every other step is no step

    def slack(**options):
        y = moved(x, rests, simultaneous=True, max_step=None, **options)
        lengths = np.linalg.norm(projected(x, rests), axis=(-2, -1))
        return np.min(
            np.sqrt(2 / 3) * distance_to_stiefel(x) + lengths - distance_to_stiefel(y)
        )

    assert slack() > -FLOAT64
    assert slack(attraction=0.05) < -1e-3  # the lemma is not trivial


def test_linear_factor():
    rng, mus = np.random.default_rng(1), np.array([0.1, 1 / 3, 0.5, 0.7, 0.9])
    x = near(rng, (9, 3), 1e-5)

    def step(mu, simultaneous):
        options = {"attraction": mu, "simultaneous": simultaneous}
        tx = landing(optax.sgd(1.0), STIEFEL, **options)
        return x + tx.update(jnp.zeros_like(x), tx.init(x), x)[0]

    with jax.enable_x64(True):
        both = jax.jit(
            lambda mus: [
                jax.vmap(lambda mu: step(mu, s))(mus)  # noqa: B023
                for s in (False, True)
            ]
        )(jnp.asarray(mus))
    for points in map(np.asarray, both):
        factors = [
            np.vdot(gram_error(y), gram_error(x)) / np.sum(gram_error(x) ** 2)
            for y in points
        ]
        np.testing.assert_allclose(factors, 1 - 2 * mus, atol=1e-4)


def slope(steps, values):
    return np.polyfit(np.log(steps), np.log(values), 1)[0]


@pytest.mark.parametrize(("simultaneous", "order"), [(False, 4), (True, 2)])
def test_attraction_of_one_half_is_the_polar_retraction(simultaneous, order):
    rng, steps = np.random.default_rng(2), np.geomspace(0.01, 0.1, 8)
    x = reference.qr(rng.normal(size=(9, 3)))
    v = projected(x, rng.normal(size=x.shape))
    v = steps[:, None, None] * v / np.linalg.norm(v, 2)
    y = moved(np.stack([x] * 8), -v, simultaneous=simultaneous, attraction=0.5)
    exact = reference.each(reference.polar, x + v)
    difference = np.linalg.norm(y - exact, axis=(-2, -1))
    assert abs(slope(steps, difference) - order) < SLOPE
    if not simultaneous:  # ¾‖v‖⁴, as the docstring says
        np.testing.assert_allclose(
            np.linalg.norm(gram_error(y), 2, axis=(-2, -1)) / steps**4, 0.75, rtol=0.02
        )


def noisy(scale, steps, quiet=0, **options):
    """Points after steps of size `scale` for each layer, then `quiet` zero steps."""
    rng = np.random.default_rng(3)
    x = reference.each(reference.qr, rng.normal(size=(len(scale), 9, 3)))
    signs = np.sign(rng.normal(size=(steps + quiet, *x.shape)))
    signs[steps:] = 0
    tx = landing(optax.sgd(1.0), STIEFEL, **options)

    @jax.jit
    def run(x, gs):
        def step(x, g):
            x = x + tx.update(g, tx.init(x), x)[0]
            return x, x

        return jax.lax.scan(step, x, gs)[1]

    gs = signs * np.reshape(scale, (-1, 1, 1))
    dtype = jnp.result_type(float)
    return np.asarray(run(jnp.asarray(x, dtype), jnp.asarray(gs, dtype)), "float64")


@pytest.mark.parametrize(("simultaneous", "order"), [(False, 4), (True, 2)])
def test_steady_residual(simultaneous, order):
    rates = np.geomspace(3e-3, 3e-2, 6)
    with jax.enable_x64(True):
        points = noisy(rates, 60, simultaneous=simultaneous)
    steady = np.mean(np.abs(gram_error(points[20:])), (0, 2, 3))
    assert abs(slope(rates, steady) - order) < SLOPE


def test_huge_steps_are_rescaled_and_land():
    for simultaneous, most in ((False, 0.1), (True, 0.5)):
        points = noisy(
            [0.5, 10.0, 1e6], 40, quiet=15, simultaneous=simultaneous, max_step=0.5
        )
        assert residual(points) < most
        assert residual(points[-1]) < (RESIDUAL if not simultaneous else NORM)
    loose = noisy([0.5, 10.0, 1e6], 40, quiet=15, max_step=None)
    assert not residual(loose[:, -1]) < 1e3


def test_the_largest_step():
    rng = np.random.default_rng(4)
    x = reference.qr(rng.normal(size=(9, 3)))
    g = 5 * rng.normal(size=x.shape)
    v = -projected(x, g)
    y = x + 0.3 * v / np.linalg.norm(v, 2)
    expected = y - y @ gram_error(y) / 2
    np.testing.assert_allclose(moved(x, g, max_step=0.3), expected, atol=NORM)
    with jax.enable_x64(True):  # on Oblique exactly, and for every column by itself
        tx, g = landing(optax.sgd(1.0), OBLIQUE, max_step=0.3), g * [1e-2, 1, 1e3]
        start = jnp.asarray(x)
        u = np.asarray(jax.jit(tx.update)(jnp.asarray(g), tx.init(start), start)[0])
    v = -tangent(x, g, True)
    y = x + v * np.minimum(1, 0.3 / np.linalg.norm(v, axis=0))
    expected = y - y @ gram_error(y, True) / 2
    np.testing.assert_allclose(x + u, expected, atol=FLOAT64)


def test_spectral_norms_are_upper_bounds():
    rng = np.random.default_rng(5)
    q = reference.qr(rng.normal(size=(40, 16)))
    flat = np.stack([q, 1e3 * q, 1e-6 * q * np.linspace(1, 2, 16), 0 * q])
    wide = rng.normal(size=(4, 30, 16))
    xs = [flat, wide, rng.normal(size=(7, 1))]
    norms = jax.jit(spectral_norms)([jnp.asarray(x, "float32") for x in xs])
    for x, norm in zip(xs, norms, strict=True):
        exact = np.linalg.norm(x, 2, axis=(-2, -1), keepdims=True)
        assert norm.shape == exact.shape
        assert (norm >= exact * (1 - 1e-5)).all() and (norm <= exact * (1 + NORM)).all()


def test_theorem_1():
    rng, rate, steps = np.random.default_rng(6), 0.1, 2000
    c = reference.qr(rng.normal(size=(10, 10)))
    c = c @ np.diag(np.linspace(1, 0.1, 10)) @ c.T
    start = near(rng, (10, 3), 1 / 8)
    with jax.enable_x64(True):
        tx = landing(optax.sgd(rate), STIEFEL, simultaneous=True, max_step=None)
        points = train(
            tx, jnp.asarray(start), lambda x: -jnp.sum(x * (c @ x)) / 2, steps
        )
    gradients = projected(points, -c @ points)
    values = np.linalg.eigvalsh(c)
    descent = (values[-3:].sum() - np.trace(start.T @ c @ start)) / 2 + 1
    for violation in (gradients, gram_error(points)):
        squares = np.sum(violation**2, (-2, -1))
        best = np.minimum.accumulate(squares)
        # The paper prints 1/K; its proof has a constant over the step size.
        assert (best * np.arange(1, steps + 1) <= descent / rate).all()
        assert squares[-1] < 1e-16  # no neighbourhood: the step is constant


LONG = 400
decaying = optax.cosine_decay_schedule(0.1, LONG)


def test_known_optima_are_reached():
    rng = np.random.default_rng(7)
    basis = reference.qr(rng.normal(size=(12, 12)))
    values = np.linspace(3, 0.1, 12)
    matrix = basis @ np.diag(values) @ basis.T
    target = rng.normal(size=(10, 4))

    def gains(p):
        x = p["eigenspace"]
        rest = [jnp.sum(p[k] * target) for k in ("procrustes", "columns")]
        return jnp.stack([jnp.sum(x * (matrix @ x)), *rest])

    start = [reference.qr(rng.normal(size=s)) for s in ((12, 3), (10, 4), (10, 4))]
    names = ("eigenspace", "procrustes", "columns")
    params = {k: jnp.asarray(x, "float32") for k, x in zip(names, start, strict=True)}
    manifolds = {"eigenspace": STIEFEL, "procrustes": STIEFEL, "columns": OBLIQUE}
    tx = landing(optax.adam(decaying), manifolds)
    points = train(tx, params, lambda p: -jnp.sum(gains(p)), LONG)
    last = jax.tree.map(lambda x: x[-1], points)
    nuclear = np.linalg.svd(target, compute_uv=False).sum()
    best = values[:3].sum(), nuclear, np.linalg.norm(target, axis=0).sum()
    np.testing.assert_allclose(gains(last), best, rtol=CONVERGENCE)
    assert all(residual(last[k]) < RESIDUAL for k in names[:2])
    assert OBLIQUE.residual(last["columns"]) < RESIDUAL


def test_points_far_from_their_manifolds_are_refused():
    x = reference.qr(np.random.default_rng(8).normal(size=(8, 3))).astype("float32")
    tx = landing(optax.sgd(0.1), {"a": ml.Euclidean(), "b": STIEFEL, "c": OBLIQUE})
    tx.init({"a": 0 * x, "b": 1.03 * x, "c": 0.97 * x})  # as saved during a run
    with pytest.raises(ml.InputError) as error:
        tx.init({"a": 0 * x, "b": 0 * x, "c": 2 * x})
    lines = str(error.value).splitlines()
    violations = [line.split("(")[0] for line in lines]
    assert violations == [
        "['b']: the point has a constraint violation of 1 on Stiefel",
        "['c']: the point has a constraint violation of 3 on Oblique",
    ]
    assert all("random_point" in line and "leaves zero" in line for line in lines)
    with pytest.raises(ml.InputError, match="rows ≥ columns") as error:
        tx.init({"a": x, "b": x.T, "c": x})
    assert "leaves zero" not in str(error.value)


def test_other_manifolds_are_refused():
    for manifold in (ml.FixedRank(), ml.BoundedRank()):
        x = {k: np.eye(6, 2, dtype="float32") for k in manifold.parts}
        with pytest.raises(ml.InputError, match="use riemannian") as error:
            landing(optax.sgd(0.1), manifold).init(x)
        assert str(manifold) in str(error.value)


@pytest.mark.parametrize("attraction", [0, 1, -0.1, 1.5, np.nan])
def test_attraction_out_of_range(attraction):
    with pytest.raises(ml.InputError, match=r"diverges from 1 on.*½"):
        landing(optax.sgd(0.1), STIEFEL, attraction=attraction)


def test_step_out_of_range():
    with pytest.raises(ml.InputError, match="max_step above 0, got 0"):
        landing(optax.sgd(0.1), STIEFEL, max_step=0)


def test_attraction_may_be_a_schedule():
    x = near(np.random.default_rng(9), (9, 3), 1e-5)
    tx = landing(optax.sgd(1.0), STIEFEL, attraction=lambda k: 0.5 / (2 - k))
    with jax.enable_x64(True):
        points = train(tx, jnp.asarray(x), lambda x: 0 * jnp.sum(x), 2)
    sizes = [np.linalg.norm(gram_error(y)) for y in (x, *points)]
    assert abs(sizes[1] / sizes[0] - 0.5) < 1e-4 and sizes[2] < 1e-4 * sizes[1]
