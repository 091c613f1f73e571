"""StelLA's trajectory against a float64 NumPy loop over its algorithm."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import manifold_lora as ml
from tests.cases import slow_but
from tests.manifolds import reference
from tests.optimizers.numpy_reference import STEPS, TRAJECTORY, adam, distance, train
from tests.tolerances import FLOAT64

HIDDEN = 12
STIEFEL = {"u": ml.Stiefel(), "s": ml.Euclidean(), "v": ml.Stiefel()}


def start(rows, columns, rank, seed=0):
    """Initial orthonormal U and V, S = I as in the paper, and a target for U S Vᵀ."""
    rng = np.random.default_rng(seed)
    u, v = (reference.qr(rng.normal(size=(n, rank))) for n in (rows, columns))
    return {"u": u, "s": np.eye(rank), "v": v}, rng.normal(size=(rows, columns))


def momentum(rate):
    """SGD with momentum 0.9."""
    trace = 0

    def direction(g, k):
        nonlocal trace
        trace = g + 0.9 * trace
        return -rate * trace

    return direction


def reference_trajectory(inner, x, w, scaled, decay, rate):
    """Steps 1 to 5 of the paper's loop; decay on every factor, as AdamW has it."""
    moves = {k: inner(rate) for k in x}
    points = []
    for number in range(1, STEPS + 1):
        error = x["u"] @ x["s"] @ x["v"].T - w
        grads = {
            "u": error @ x["v"] @ x["s"].T,
            "s": x["u"].T @ error @ x["v"],
            "v": error.T @ x["u"] @ x["s"],
        }
        new = {}
        for k, g in grads.items():
            tall = k != "s"
            if tall:
                g = g - x[k] @ g.T @ x[k]
            d = moves[k](g, number) - rate * decay * x[k]
            if tall and scaled:
                d = d * np.sqrt(HIDDEN / len(d))
            if tall:
                d = d - x[k] @ (x[k].T @ d + d.T @ x[k]) / 2
            new[k] = reference.polar(x[k] + d) if tall else x[k] + d
        x = new
        points.append(x)
    return points


INNER = {
    "adam": (None, adam, 0.0),
    "adamw": (None, adam, 0.1),
    "momentum": (lambda rate: optax.sgd(rate, 0.9), momentum, 0.0),
}


@pytest.mark.parametrize("name", INNER)
@pytest.mark.parametrize("rate", [0.02, 0.5])
@pytest.mark.parametrize(
    ("shape", "scaled"),
    slow_but(
        [((9, 6, 3), True)],
        [((9, 6, 3), True), ((9, 6, 3), False), ((4, 7, 4), True)],
    ),
)
def test_trajectory(name, rate, shape, scaled):
    optax_inner, numpy_inner, decay = INNER[name]
    if name == "momentum":
        rate /= 5  # the problem's own limit
    x, w = start(*shape)
    with jax.enable_x64(True):
        tx = ml.stella(
            rate,
            STIEFEL,
            hidden_size=HIDDEN if scaled else None,
            weight_decay=decay,
            inner=optax_inner,
        )

        def loss(p):
            return jnp.sum((p["u"] @ p["s"] @ p["v"].mT - w) ** 2) / 2

        points = train(tx, jax.tree.map(jnp.asarray, x), loss)
    expected = reference_trajectory(numpy_inner, x, w, scaled, decay, rate)
    assert distance(points, expected) < TRAJECTORY
    other = reference_trajectory(numpy_inner, x, w, not scaled, decay, rate)
    assert distance(points, other) > 1e-3  # the scale matters


def test_decay_acts_on_s_only():
    x, w = start(9, 6, 3)
    with jax.enable_x64(True):

        def moved(decay):
            tx = ml.stella(0.1, STIEFEL, weight_decay=decay)
            params = jax.tree.map(jnp.asarray, x)
            zero = jax.tree.map(jnp.zeros_like, params)
            updates, _ = jax.jit(tx.update)(zero, tx.init(params), params)
            return jax.tree.map(np.asarray, updates)

        decayed = moved(0.3)
    np.testing.assert_allclose(decayed["s"], -0.03 * np.eye(3), atol=FLOAT64)
    assert max(np.abs(decayed[k]).max() for k in ("u", "v")) < FLOAT64
    assert w.shape == (9, 6)
