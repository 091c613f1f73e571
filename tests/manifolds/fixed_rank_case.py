"""Points of fixed rank, and one compiled program per shape for all their tests."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from manifold_lora.manifolds.fixed_rank import FixedRank
from tests.cases import slow_but
from tests.manifolds import reference_fixed_rank as reference
from tests.manifolds.reference_fixed_rank import dense
from tests.tolerances import FLOAT32, FLOAT64

TOLERANCE = {"float32": FLOAT32, "float64": FLOAT64}
TRUNCATION, ORTHOGRAPHIC = FixedRank(), FixedRank("orthographic")
BOTH = {"truncation": TRUNCATION, "orthographic": ORTHOGRAPHIC}
both = pytest.mark.parametrize("name", BOTH)
# One program per shape serves all tests, so there are few shapes.
RETRACT = {name: jax.jit(manifold.retract) for name, manifold in BOTH.items()}
PROJECT, GRADIENT, TRANSPORT, INNER = map(
    jax.jit,
    (
        ORTHOGRAPHIC.project,
        ORTHOGRAPHIC.riemannian_gradient,
        ORTHOGRAPHIC.transport,
        ORTHOGRAPHIC.inner,
    ),
)
GRAD = jax.jit(jax.grad(lambda w, a: jnp.sum(jnp.sin(a * w) + a * w)))
# (…, m, n, r); with m < 2r the frame [U Uₚ] has more columns than rows.
BATCH, ONE, WIDE = (12, 9, 7, 3), (9, 7, 3), (5, 12, 3)
CASES = [
    (BATCH, "float64"),
    (ONE, "float64"),
    (WIDE, "float64"),
    ((4, 4, 4), "float64"),
    ((2, 3, 6, 5, 1), "float32"),
]
table = pytest.mark.parametrize(
    ("shape", "dtype"), slow_but([CASES[0], CASES[-1]], CASES), ids=str
)
RNG = np.random.default_rng


@contextlib.contextmanager
def precision(dtype):
    with jax.enable_x64(dtype == "float64"):
        yield TOLERANCE[dtype]


def cast(tree, dtype):
    return {key: jnp.asarray(a, dtype) for key, a in tree.items()}


def scaled(t, v):
    return {key: t * a for key, a in v.items()}


def stack(*trees):
    return {key: np.stack([np.asarray(t[key]) for t in trees]) for key in trees[0]}


def spread(x, k=BATCH[0]):
    """The same point k times."""
    return {key: np.broadcast_to(a, (k, *np.shape(a))) for key, a in x.items()}


def close(a, b, tolerance, scale=1.0):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(scale, 1))


def draw(shape, seed=0):
    rng = RNG(seed)
    x = reference.draw(rng, shape)
    return x, reference.ambient(rng, x), reference.ambient(rng, x)


def pair(x, g):
    """G V, UᵀG V and GᵀU of the dense gradient G."""
    gv, gtu = g @ x["v"], np.swapaxes(g, -1, -2) @ x["u"]
    return {"u": gv, "s": np.swapaxes(x["u"], -1, -2) @ gv, "v": gtu}


@functools.cache
def everything(shape, dtype):
    """Inputs and results of all operations at one point."""
    x, d, e = draw(shape)
    a = RNG(1).normal(size=dense(x).shape)
    with precision(dtype) as tolerance:
        x, d, e = (cast(t, dtype) for t in (x, d, e))
        g = GRAD(jnp.asarray(dense(x)), a)
        g, step = np.asarray(g), scaled(0.2, d)
        out = {name: f(x, step) for name, f in RETRACT.items()}
        out |= {f"{name} still": f(x, scaled(0, d)) for name, f in RETRACT.items()}
        y, p = out["orthographic"], PROJECT(x, d)
        out |= {
            "x": x, "d": d, "e": e, "step": step, "a": a, "g": g,
            "projected": p, "twice": PROJECT(x, p),
            "gradient": GRADIENT(x, cast(pair(reference.float64(x), g), dtype)),
            "inner": INNER(x, d, e), "square": INNER(x, d, d),
            "adjoint": (INNER(x, p, e), INNER(x, d, PROJECT(x, e))),
            "carried": TRANSPORT(x, y, d), "stayed": TRANSPORT(x, x, d),
            "e carried": TRANSPORT(x, y, e),
            "sum carried": TRANSPORT(x, y, {k: 2 * d[k] + e[k] for k in d}),
        }  # fmt: skip
        return jax.tree.map(np.asarray, out), tolerance
