"""Trajectories against float64 NumPy, and convergence to known optima.

The references are loops over the printed formulas, never the code under test.
"""

from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import manifold_lora as ml
from manifold_lora.manifolds.stiefel import Retraction
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
    trained,
    transposed,
)
from tests.tolerances import (
    BFLOAT16,
    CONVERGENCE,
    EFFECTIVE_RANK,
    FLOAT64,
    RESIDUAL,
)

RATE, FREE_RATE = 0.2, 1e-2


def riemannian_reference(inner, retraction, gradient):
    a, b, w = least_squares()
    inner_a, inner_b = inner(RATE), inner(RATE)
    points = []
    for k in range(1, STEPS + 1):
        error = b @ transposed(a) - w
        g_a, g = transposed(error) @ b, error @ a
        if gradient == "canonical":
            g = g - b @ transposed(g) @ b
        elif gradient == "euclidean":
            g = projected(b, g)
        v = projected(b, inner_b(g, k))
        a = a + inner_a(g_a, k)
        b = reference.each(getattr(reference, retraction), b + v)
        points.append({"a": a, "b": b})
    return points


def stiefel_lora_reference():
    """Algorithm 1 of arXiv:2508.17901."""
    a, b, w = least_squares()
    move_a = adam(FREE_RATE)
    m = v = 0
    points = []
    for k in range(1, STEPS + 1):
        error = b @ transposed(a) - w
        g_a, g = transposed(error) @ b, error @ a
        m = 0.9 * m + 0.1 * g
        v = 0.999 * v + 0.001 * g**2
        direction = (m / (1 - 0.9**k)) / (np.sqrt(v / (1 - 0.999**k)) + 1e-8)
        xi = projected(b, direction)
        q, r = np.linalg.qr(b - RATE * xi)
        signs = np.sign(np.diagonal(r, axis1=-2, axis2=-1))
        a, b = a + move_a(g_a, k), q * signs[:, None, :]
        points.append({"a": a, "b": b})
    return points


INNER = {"sgd": (optax.sgd, sgd), "adam": (optax.adam, adam)}


@pytest.mark.parametrize(
    ("inner", "retraction", "gradient"),
    [
        ("sgd", "polar", "canonical"),
        ("sgd", "qr", "euclidean"),
        ("adam", "polar", "euclidean"),
        ("adam", "qr", "canonical"),
        ("adam", "qr", "ambient"),
    ],
)
def test_riemannian_trajectory(inner, retraction, gradient):
    ambient = gradient == "ambient"
    metric = "canonical" if ambient else gradient
    optax_inner, numpy_inner = INNER[inner]
    with jax.enable_x64(True):
        tx = ml.riemannian(
            optax_inner(RATE),
            {"a": ml.Euclidean(), "b": ml.Stiefel(retraction, metric)},
            gradient="euclidean" if ambient else "riemannian",
        )
        points = trained(tx)
    expected = riemannian_reference(numpy_inner, retraction, gradient)
    assert distance(points, expected) < TRAJECTORY


QR = {"a": ml.Euclidean(), "b": ml.Stiefel("qr")}


def stiefel_lora(**options):
    return ml.stiefel_lora(RATE, QR, free_learning_rate=FREE_RATE, **options)


def test_stiefel_lora_trajectory():
    with jax.enable_x64(True):
        points = trained(stiefel_lora())
    assert distance(points, stiefel_lora_reference()) < TRAJECTORY


def qr_without_signs(manifold, x, v):
    del manifold
    return jnp.linalg.qr(x + v)[0]


def step_backwards(manifold, x, v, retract=ml.Stiefel.retract):
    return retract(manifold, x, -v)


@pytest.mark.parametrize(
    ("method", "mutant"),
    [
        ("retract", qr_without_signs),
        ("retract", step_backwards),
    ],
)
def test_trajectory_detects_a_mutation(monkeypatch, method, mutant):
    monkeypatch.setattr(ml.Stiefel, "step", ml.Manifold.step)
    monkeypatch.setattr(ml.Stiefel, method, mutant)
    with jax.enable_x64(True):
        points = trained(stiefel_lora())
    assert distance(points, stiefel_lora_reference()) > 1e-3


def test_trajectory_detects_a_projection_without_half(monkeypatch):
    monkeypatch.setattr("manifold_lora.manifolds.stiefel.sym", lambda a: a + a.mT)
    with jax.enable_x64(True):
        points = trained(stiefel_lora())
    assert distance(points, stiefel_lora_reference()) > 1e-3


def test_trajectory_detects_moments_of_the_wrong_gradient():
    with jax.enable_x64(True):
        points = trained(ml.riemannian(optax.adam(RATE), QR))
    expected = riemannian_reference(adam, "qr", "ambient")
    assert distance(points, expected) > 1e-3


def test_weight_decay_has_no_effect_on_a_stiefel_factor():
    manifolds = {"b": ml.Stiefel("qr")}
    decayed = ml.stiefel_lora(RATE, manifolds, weight_decay=0.3)
    plain = ml.riemannian(optax.adam(RATE), manifolds, gradient="euclidean")
    with jax.enable_x64(True):
        difference = trained(decayed, ["b"])["b"] - trained(plain, ["b"])["b"]
    assert np.max(np.abs(difference)) < FLOAT64


def test_anything_after_riemannian_in_a_chain_leaves_the_manifold():
    def residual(tx):
        b = np.float64(trained(tx, ["b"], "float32", steps=5)["b"])
        return np.max(np.abs(transposed(b) @ b - np.eye(3)))

    manifolds = {"b": ml.Stiefel("qr")}
    inner, scale, decay = (
        optax.sgd(RATE),
        optax.scale(0.5),
        optax.add_decayed_weights(-0.1),
    )
    within = ml.riemannian(optax.chain(inner, scale, decay), manifolds)
    assert residual(within) < RESIDUAL
    assert residual(optax.chain(ml.riemannian(inner, manifolds), scale)) > 1e-2
    assert residual(optax.chain(ml.riemannian(inner, manifolds), decay)) > 1e-2


def effective_rank(b):
    """Exp of the entropy of the normalised singular values (Roy & Vetterli)."""
    s = np.linalg.svd(b, compute_uv=False)
    p = s / s.sum(-1, keepdims=True)
    return np.exp(-np.sum(p * np.log(p), -1))


def test_a_thousand_float32_steps_preserve_the_rank():
    _, b, w = (jnp.asarray(x, "float32") for x in least_squares(32, 8, 4))
    params = {"a": jnp.zeros((2, 8, 4)), "b": b}

    def loss(p):
        return jnp.mean((p["b"] @ p["a"].mT - w) ** 2)

    @jax.jit
    def run(rate):
        tx = ml.stiefel_lora(rate, QR, free_learning_rate=FREE_RATE)

        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            params: Any = optax.apply_updates(params, updates)
            return (params, state), (params["b"], loss(params))

        return jax.lax.scan(step, (params, tx.init(params)), length=1000)[1]

    for rate in (0.1, 0.3):
        points, losses = run(rate)
        gram = transposed(np.float64(points)) @ np.float64(points)
        assert np.max(np.abs(gram - np.eye(4))) < RESIDUAL
        assert np.max(np.abs(effective_rank(points) - 4)) < EFFECTIVE_RANK
        assert losses[-1] < 0.8 * losses[0]


LONG = 400
decaying = optax.cosine_decay_schedule(0.1, LONG)


def gains(p, matrix, target):
    """The objectives, to be maximised: tr XᵀAX and tr YᵀB."""
    return jnp.sum(p["eigenspace"] * (matrix @ p["eigenspace"])), jnp.sum(
        p["procrustes"] * target
    )


def two_problems(dtype):
    """A symmetric matrix and its eigenvalues, a target, and two initial points."""
    rng = np.random.default_rng(1)
    basis = reference.qr(rng.normal(size=(12, 12)))
    values = np.linspace(3, 0.1, 12)
    target = rng.normal(size=(10, 4))
    start = {
        "eigenspace": jnp.asarray(reference.qr(rng.normal(size=(12, 3))), dtype),
        "procrustes": jnp.asarray(reference.qr(rng.normal(size=(10, 4))), dtype),
    }
    return basis @ np.diag(values) @ basis.T, values, target, start


@pytest.mark.parametrize(
    "inner", [optax.sgd(0.05, 0.9), optax.adam(decaying)], ids=["momentum", "adam"]
)
def test_known_optima_are_reached(inner):
    matrix, values, target, start = two_problems("float32")
    tx = ml.riemannian(inner, ml.Stiefel())
    points = train(tx, start, lambda p: -sum(gains(p, matrix, target)), LONG)
    end = jax.tree.map(lambda x: x[-1], points)
    quotient, overlap = gains(end, matrix, target)
    # The sum of the three largest eigenvalues, and the polar factor of the target.
    best = values[:3].sum(), np.trace(reference.polar(target).T @ target)
    assert abs(quotient / best[0] - 1) < CONVERGENCE
    assert abs(overlap / best[1] - 1) < CONVERGENCE


@pytest.mark.parametrize("name", get_args(Retraction))
def test_gradients_vanish_at_the_optima(name):
    with jax.enable_x64(True):
        matrix, values, target, start = two_problems("float64")
        tx = ml.riemannian(optax.sgd(0.05, 0.9), ml.Stiefel(name), transport=True)
        points = train(tx, start, lambda p: -sum(gains(p, matrix, target)), 2 * LONG)
    x, y = points["eigenspace"][-1], points["procrustes"][-1]
    assert np.linalg.norm(matrix @ x - x @ (x.T @ matrix @ x)) < 1e-10
    assert np.linalg.norm(projected(y, target)) < 1e-10
    assert abs(np.trace(x.T @ matrix @ x) - values[:3].sum()) < FLOAT64 * 10
    np.testing.assert_allclose(y, reference.polar(target), atol=1e-9)


def test_stiefel_lora_finds_the_best_low_rank_approximation():
    tx = ml.stiefel_lora(decaying, QR, free_learning_rate=decaying)
    points = trained(tx, dtype="float32", steps=LONG)
    a, b, w = points["a"][-1], points["b"][-1], least_squares()[2]
    error = np.sum((b @ transposed(a) - w) ** 2)
    tail = np.linalg.svd(w, compute_uv=False)[:, 3:]
    assert abs(error / np.sum(tail**2) - 1) < CONVERGENCE


def test_bfloat16_points():
    tx = ml.riemannian(optax.sgd(0.05), ml.Stiefel(), gradient="euclidean")
    rng = np.random.default_rng(2)
    x: Any = jnp.asarray(reference.qr(rng.normal(size=(64, 4))), "bfloat16")
    state, update = tx.init(x), jax.jit(tx.update)
    for _ in range(3):
        g = jnp.asarray(rng.normal(size=x.shape), "bfloat16")
        updates, state = update(g, state, x)
        old, x = np.asarray(x, "float64"), optax.apply_updates(x, updates)
        assert x.dtype == updates.dtype == jnp.bfloat16
        new = np.asarray(x, "float64")
        step = projected(old, -0.05 * np.asarray(g, "float64"))
        assert np.max(np.abs(new - reference.polar(old + step))) < BFLOAT16
        assert np.max(np.abs(new.T @ new - np.eye(4))) < BFLOAT16
