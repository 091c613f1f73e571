"""NumPy references of optimisers in float64, and the problems to compare them on."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tests.manifolds import reference

STEPS = 20
TRAJECTORY = 1e-9  # float64, rounding grown over the steps


def least_squares(rows=8, columns=5, rank=3, layers=2):
    """The initial (a, b) and the target w of ½‖b aᵀ − w‖², b orthonormal."""
    rng = np.random.default_rng(0)
    a = rng.normal(size=(layers, columns, rank))
    b = reference.each(reference.qr, rng.normal(size=(layers, rows, rank)))
    return a, b, rng.normal(size=(layers, rows, columns))


def train(tx, params, loss, steps=STEPS):
    """The parameters after every step, stacked, by one scan under jit."""

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    @jax.jit
    def run(params):
        return jax.lax.scan(step, (params, tx.init(params)), length=steps)[1]

    return jax.tree.map(np.asarray, run(params))


def trained(tx, names=("a", "b"), dtype="float64", steps=STEPS):
    """The least squares problem, solved in some or all of its factors."""
    a, b, w = (jnp.asarray(x, dtype) for x in least_squares())
    params = {"a": a, "b": b}

    def loss(trainable):
        p = {**params, **trainable}
        return jnp.sum((p["b"] @ p["a"].mT - w) ** 2) / 2

    return train(tx, {name: params[name] for name in names}, loss, steps)


def transposed(x):
    return x.swapaxes(-1, -2)


def projected(x, z):
    xz = transposed(x) @ z
    return z - x @ (xz + transposed(xz)) / 2


def sgd(rate):
    return lambda g, k: -rate * g


def adam(rate, b1=0.9, b2=0.999, eps=1e-8):
    m = v = 0

    def direction(g, k):
        nonlocal m, v
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        return -rate * (m / (1 - b1**k)) / (np.sqrt(v / (1 - b2**k)) + eps)

    return direction


def distance(points, expected):
    """The largest difference between two trajectories."""
    return max(
        np.max(np.abs(points[name] - np.stack([p[name] for p in expected])))
        for name in points
    )
