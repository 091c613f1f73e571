"""Transport of the momentum, and the scale of updates."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import manifold_lora as ml
from manifold_lora.optimizers import moments
from tests.cases import slow_but
from tests.manifolds import reference
from tests.optimizers.numpy_reference import (
    STEPS,
    TRAJECTORY,
    distance,
    least_squares,
    projected,
    trained,
    transposed,
)
from tests.tolerances import FLOAT64

RATE = 0.02
STIEFEL = {"a": ml.Euclidean(), "b": ml.Stiefel(metric="euclidean")}


def momentum_reference(transport):
    """SGD with momentum on B and A; B's momentum projected at every new point."""
    a, b, w = least_squares()
    m_a = m_b = 0
    points = []
    for _ in range(STEPS):
        error = b @ transposed(a) - w
        m_a = transposed(error) @ b + 0.9 * m_a
        m_b = projected(b, error @ a) + 0.9 * m_b
        a = a - RATE * m_a
        b = reference.each(reference.polar, b + projected(b, -RATE * m_b))
        if transport:
            m_b = projected(b, m_b)
        points.append({"a": a, "b": b})
    return points


@pytest.mark.parametrize("transport", [True, False])
def test_trajectory_of_transported_momentum(transport):
    with jax.enable_x64(True):
        tx = ml.riemannian(optax.sgd(RATE, 0.9), STIEFEL, transport=transport)
        points = trained(tx)
    assert distance(points, momentum_reference(transport)) < TRAJECTORY
    assert distance(points, momentum_reference(not transport)) > 1e-3


def adam_in_a_partition():
    return optax.partition(
        {"one": optax.adam(RATE), "two": optax.adam(RATE)}, {"a": "one", "b": "two"}
    )


INNER = {
    "adam": (lambda: optax.adam(RATE), "mu"),
    "momentum": (lambda: optax.sgd(RATE, 0.9), "trace"),
    "lion": (lambda: optax.lion(RATE), "mu"),
    "adan": (lambda: optax.adan(RATE), "m"),
    "chain": (
        lambda: optax.chain(optax.clip(10.0), optax.ema(0.9), optax.scale(-RATE)),
        "ema",
    ),
    "partition": (adam_in_a_partition, "mu"),
    "injected": (lambda: optax.inject_hyperparams(optax.adam)(RATE), "mu"),
    "accumulated": (
        lambda: optax.MultiSteps(optax.adam(RATE), 1).gradient_transformation(),
        "mu",
    ),
}


def of_b(moment):
    return moment["b"] if isinstance(moment, dict) else moment.b


@pytest.mark.parametrize("name", slow_but(["momentum", "chain", "injected"], INNER))
def test_first_moments_are_projected_in_any_inner_state(name):
    make, field = INNER[name]
    rng = np.random.default_rng(0)
    with jax.enable_x64(True), jax.disable_jit():
        params: Any = {"a": jnp.asarray(rng.normal(size=(4, 3)))}
        params["b"] = jnp.asarray(reference.qr(rng.normal(size=(8, 3))))
        g = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), params)
        states = {}
        for transport in (True, False):
            tx = ml.riemannian(make(), STIEFEL, transport=transport)
            updates: Any
            updates, states[transport] = tx.update(g, tx.init(params), params)
            y = np.asarray(params["b"] + updates["b"])
        pairs = zip(
            optax.tree.get_all_with_path(states[True], field),
            optax.tree.get_all_with_path(states[False], field),
            strict=True,
        )
        moments_of_b = 0
        for (_, moved), (_, plain) in pairs:
            if jax.tree.leaves(of_b(moved)):
                expected = projected(y, np.asarray(of_b(plain)))
                np.testing.assert_allclose(of_b(moved), expected, atol=FLOAT64)
                assert np.abs(expected - of_b(plain)).max() > 1e-6
                moments_of_b += 1
            if jax.tree.leaves(moved["a"]):
                np.testing.assert_array_equal(moved["a"], plain["a"])
        assert moments_of_b == 1
        # Everything else, including the second moments, is unchanged.
        blank = functools.partial(moments.replace, lambda moment: 0)
        chex.assert_trees_all_equal(*map(blank, (states[True], states[False])))


def test_second_moments_stay_positive(monkeypatch):
    def least(names):
        monkeypatch.setattr(moments, "NAMES", names)
        tx = ml.riemannian(optax.adam(0.1), ml.Stiefel(), transport=True)
        x: Any = ml.Stiefel().random_point(jax.random.key(0), (8, 3))
        state, update = tx.init(x), jax.jit(tx.update)
        lowest = np.inf
        for key in jax.random.split(jax.random.key(1), 5):
            updates, state = update(jax.random.normal(key, x.shape), state, x)
            x = x + updates
            lowest = min(lowest, float(optax.tree.get(state, "nu").min()))
        return lowest

    assert least(moments.NAMES) >= 0
    assert least(("mu", "nu")) < 0  # transport would make it negative


def test_transport_without_a_first_moment_is_refused():
    tx = ml.riemannian(optax.sgd(0.1), STIEFEL, transport=True)
    params = {"a": jnp.ones((4, 3)), "b": jnp.eye(8, 3)}
    with pytest.raises(ml.InputError, match="no first moment.*mu, trace"):
        tx.init(params)


def test_update_scale_is_for_constrained_leaves():
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        b = reference.qr(rng.normal(size=(8, 3)))
        params = {"a": jnp.ones((4, 3)), "b": jnp.asarray(b)}
        g = {"a": jnp.ones((4, 3)), "b": jnp.asarray(rng.normal(size=(8, 3)))}
        tx = ml.riemannian(
            optax.sgd(0.1), STIEFEL, update_scale=lambda x: 3.0 / x.shape[-1]
        )
        scaled, _ = jax.jit(tx.update)(g, tx.init(params), params)
        tx = ml.riemannian(optax.sgd(0.1), STIEFEL, update_scale=lambda x: 0.5)
        halved, _ = jax.jit(tx.update)(g, tx.init(params), params)
    for updates, factor in ((scaled, 1.0), (halved, 0.5)):
        d = projected(b, -0.1 * factor * projected(b, np.asarray(g["b"])))
        expected = reference.polar(b + d) - b
        np.testing.assert_allclose(updates["b"], expected, atol=FLOAT64)
        np.testing.assert_array_equal(updates["a"], np.full((4, 3), -0.1))


def test_update_scale_of_a_coupled_point_is_one_number():
    manifold = ml.BoundedRank()
    x = manifold.random_point(jax.random.key(0), (6, 5, 2))
    g = manifold.random_tangent(jax.random.key(1), x)
    updates = [
        ml.riemannian(optax.sgd(rate), manifold, update_scale=scale).update(
            g, (optax.EmptyState(), optax.EmptyState()), x
        )[0]
        for rate, scale in ((0.1, lambda x: x["v"].shape[-2] / 5.0), (0.1, None))
    ]
    chex.assert_trees_all_equal(*updates)
