"""One table of optimisers, and the problem on which contracts are checked."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import manifold_lora as ml
from tests.tolerances import FLOAT32, RESIDUAL

RATE, ROWS = 0.1, 8
FREE = ml.Euclidean()


class Row(NamedTuple):
    """An optimiser, the manifold of its point "b", and what its free leaves get."""

    manifold: ml.Manifold
    make: Callable[..., optax.GradientTransformationExtraArgs]  # (rate, manifolds)
    # None: the optimiser takes no manifolds
    free: Callable[[float], optax.GradientTransformation] | None
    within: float = RESIDUAL  # constraint violation allowed after a step

    @property
    def manifolds(self):
        return {"a": FREE, "b": self.manifold, "scale": FREE}

    @property
    def tx(self):
        return self.make(RATE, self.manifolds)

    def of_shapes(self, params):
        """The tree of manifolds from the shapes of the parameters."""

        def one(x):
            tall = not self.manifold.is_point(x) and x.shape[-2:-1] != (ROWS,)
            return FREE if tall else self.manifold

        return jax.tree.map(one, params, is_leaf=self.manifold.is_point)

    def problem(self, layers=2):
        return problem(self.manifold, layers)


momentum = functools.partial(optax.sgd, momentum=0.9)
decayed = functools.partial(optax.adamw, weight_decay=0.1)
euclidean_metric = ml.Stiefel("qr", "euclidean")
undecayed = functools.partial(optax.adamw, weight_decay=0.0)


def wrapped(inner, manifold, **options):
    def make(learning_rate, manifolds):
        return ml.riemannian(inner(learning_rate), manifolds, **options)

    return Row(manifold, make, inner)


def row_of(recipe, manifold, free=optax.adam, within=RESIDUAL, **options):
    """A recipe that takes the rate and the manifolds."""
    return Row(manifold, functools.partial(recipe, **options), free, within)


def landing_row(wrapper, manifold):
    def make(learning_rate, manifolds):
        return wrapper(optax.adam(learning_rate), manifolds)

    return Row(manifold, make, optax.adam, within=0.2)


def baseline(recipe):
    """An optimiser of pairs of factors, which takes no manifolds."""

    def make(learning_rate, manifolds):
        del manifolds
        return recipe(learning_rate, ml.FactorSpec())

    return Row(FREE, make, None)


OPTIMIZERS = {
    "adam": wrapped(optax.adam, ml.Stiefel()),
    "momentum-qr": wrapped(momentum, ml.Stiefel("qr"), transport=True),
    "adamw-flat": wrapped(decayed, euclidean_metric),
    "adamw-ambient": wrapped(decayed, ml.Stiefel("cayley"), gradient="euclidean"),
    "lion-qr-ambient": wrapped(optax.lion, ml.Stiefel("qr"), gradient="euclidean"),
    "adam-oblique": wrapped(optax.adam, ml.Oblique("exp"), transport=True),
    "momentum-fixed": wrapped(momentum, ml.FixedRank("orthographic")),
    "stiefel_lora": row_of(
        ml.stiefel_lora, ml.Stiefel("qr"), lambda _: undecayed(1e-4)
    ),
    "stella": row_of(ml.stella, ml.Stiefel(), undecayed, hidden_size=16),
    "loram": row_of(ml.loram, ml.BoundedRank(), undecayed, bias_correction=True),
    "landing": landing_row(ml.landing, ml.Stiefel()),
    "landing-oblique": landing_row(
        functools.partial(ml.landing, simultaneous=True), ml.Oblique()
    ),
    "landing_adamw": row_of(
        ml.landing_adamw, ml.Stiefel(), undecayed, lower=1.0, upper=1.0, within=0.5
    ),
    "scaled_gd": baseline(ml.scaled_gd),
    "lora_plus": baseline(ml.lora_plus),
}


def over(*names, quick=None):
    """Parametrise by rows, of which only the quick ones are in the default run."""
    rows = [
        pytest.param(
            OPTIMIZERS[name],
            id=name,
            marks=[pytest.mark.slow] if quick and name not in quick else [],
        )
        for name in names
    ]
    return pytest.mark.parametrize("row", rows)


# Every optimiser and every manifold; the others are variants of these.
QUICK = (
    "adam",
    "adam-oblique",
    "momentum-fixed",
    "stiefel_lora",
    "stella",
    "loram",
    "landing",
    "landing_adamw",
    "scaled_gd",
    "lora_plus",
)
each = over(*OPTIMIZERS, quick=QUICK)
each_on_manifolds = over(
    *(name for name, row in OPTIMIZERS.items() if row.free), quick=QUICK
)


@functools.cache
@jax.enable_x64(False)  # whichever test calls it first
def problem(manifold, layers=2):
    """A free matrix, stacked points and a free vector, with two gradients."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), "float32")

    def orthonormal(x):
        return jnp.asarray(np.linalg.qr(x)[0])

    def draw():
        parts = {"u": (ROWS, 3), "s": (3, 3), "v": (ROWS, 3), "a": (ROWS, 3)}
        b = {k: normal(layers, *parts[k]) for k in manifold.parts}
        return {
            "a": normal(layers, 4, 3),
            "b": b or normal(layers, ROWS, 3),
            "scale": normal(3),
        }

    params = draw()
    if manifold.parts:
        tall = {k: orthonormal(params["b"][k]) for k in manifold.parts if k in "uv"}
        params["b"] |= tall
        if "s" in params["b"]:
            params["b"]["s"] = params["b"]["s"] / 4 + 2 * jnp.eye(3)
    else:
        params["b"] = orthonormal(params["b"])
    return params, [draw(), draw()]


def halves(gradients):
    """Two gradients for every one, which is their mean."""
    return [optax.tree.scale(c, g) for g in gradients for c in (0.5, 1.5)]


def run(tx, params, gradients):
    """The parameters after each step."""
    points = []
    with jax.disable_jit():
        state = tx.init(params)
        for g in gradients:
            updates, state = tx.update(g, state, params)
            params = optax.apply_updates(params, updates)
            points.append(params)
    return points


@functools.cache
def plain(row):
    """The points of the unwrapped optimiser."""
    return run(row.tx, *row.problem())


def assert_close(a, b, tolerance=FLOAT32):
    chex.assert_trees_all_close(a, b, rtol=0, atol=tolerance)


def types(tree):
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(x.shape, x.dtype, x.weak_type) for x in leaves]


def free_leaves(tree):
    return {"a": tree["a"], "scale": tree["scale"]}
