"""One table of optimisers, and the problem that every contract is tried on."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import manifold_lora as ml
from tests.tolerances import FLOAT32

RATE = 0.1


class Row(NamedTuple):
    """An optimiser, the manifold of its factor, and what its free leaves get."""

    stiefel: ml.Stiefel
    make: Callable[..., optax.GradientTransformationExtraArgs]  # (rate, manifolds)
    free: Callable[[float], optax.GradientTransformation]

    @property
    def manifolds(self):
        return {"a": ml.Euclidean(), "b": self.stiefel, "scale": ml.Euclidean()}

    @property
    def tx(self):
        return self.make(RATE, self.manifolds)

    def by_shape(self, params):
        return jax.tree.map(
            lambda x: self.stiefel if x.ndim == 3 else ml.Euclidean(), params
        )


def wrapped(inner, stiefel, **options):
    def make(learning_rate, manifolds):
        return ml.riemannian(inner(learning_rate), manifolds, **options)

    return Row(stiefel, make, inner)


momentum = functools.partial(optax.sgd, momentum=0.9)
decayed = functools.partial(optax.adamw, weight_decay=0.1)
euclidean_metric = ml.Stiefel("qr", "euclidean")
OPTIMIZERS = {
    "adam": wrapped(optax.adam, ml.Stiefel()),
    "momentum-qr": wrapped(momentum, ml.Stiefel("qr")),
    "adamw-flat": wrapped(decayed, euclidean_metric),
    "adamw-ambient": wrapped(decayed, ml.Stiefel("qr"), gradient="euclidean"),
    "lion-qr-ambient": wrapped(optax.lion, ml.Stiefel("qr"), gradient="euclidean"),
    "stiefel_lora": Row(
        ml.Stiefel("qr"),
        ml.stiefel_lora,
        lambda _: optax.adamw(1e-4, weight_decay=0.0),
    ),
}


def over(*names):
    rows = [pytest.param(OPTIMIZERS[name], id=name) for name in names]
    return pytest.mark.parametrize("row", rows)


each = over(*OPTIMIZERS)


@functools.cache
def problem(layers=2):
    """A free matrix, a stacked factor and a free vector, with two gradients."""
    rng = np.random.default_rng(0)
    shapes = {"a": (4, 3), "b": (layers, 8, 3), "scale": (3,)}

    def draw():
        return {
            k: jnp.asarray(rng.normal(size=s), "float32") for k, s in shapes.items()
        }

    params = draw()
    params["b"] = jnp.asarray(np.linalg.qr(params["b"])[0])
    return params, [draw(), draw()]


def halves():
    """Two gradients for every one of the problem, which is their mean."""
    return [optax.tree.scale(c, g) for g in problem()[1] for c in (0.5, 1.5)]


def run(tx, params=None, gradients=None):
    """The parameters after each step."""
    start, drawn = problem()
    params = start if params is None else params
    points = []
    with jax.disable_jit():
        state = tx.init(params)
        for g in drawn if gradients is None else gradients:
            updates, state = tx.update(g, state, params)
            params = optax.apply_updates(params, updates)
            points.append(params)
    return points


@functools.cache
def plain(row):
    """The points that every wrapping of the optimiser should reach."""
    return run(row.tx)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_close(a, b, tolerance=FLOAT32):
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=tolerance)
    jax.tree.map(close, a, b)


def types(tree):
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(x.shape, x.dtype, x.weak_type) for x in leaves]


def free_leaves(tree):
    return {"a": tree["a"], "scale": tree["scale"]}
