"""One table of manifolds: how to draw points, and the reference to agree with.

Everything here is float64 NumPy, batched over leading axes, and independent of
the code under test. A point is an array, or a dict of arrays.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import manifold_lora as ml
from manifold_lora.manifolds.bounded_rank import BoundedRank
from manifold_lora.manifolds.fixed_rank import FixedRank
from manifold_lora.manifolds.oblique import Oblique
from tests.manifolds import reference, reference_bounded_rank, reference_fixed_rank
from tests.manifolds.reference import each
from tests.tolerances import FLOAT32, FLOAT64, RESIDUAL

MATRICES = [(5, 5), (9, 1), (2, 3, 10, 3), (16, 6)]
PRODUCTS = [(5, 5, 5), (2, 3, 7, 8, 2)]  # (…, m, n, r)
FEASIBLE = {"float32": RESIDUAL, "float64": FLOAT64}
TOLERANCE = {"float32": FLOAT32, "float64": FLOAT64}
SIZES = (0, 1e-6, 1e-3, 0.3, 0.6, 1.0, 10.0, 100.0, 1e3)


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """A manifold and its NumPy reference.

    The embedding maps a point to an array, and a tangent to the velocity of that
    array, so that its Frobenius norm is a length; by default it is the point.
    """

    manifold: Any
    draw: Callable[..., Any]  # (rng, shape) → point
    tangent: Callable[..., Any]  # (rng, point) → tangent
    projection: Callable[..., Any]  # (point, ambient) → embedded tangent
    inner: Callable[..., Any]  # (point, tangent, tangent)
    shapes: Sequence[tuple[int, ...]] = tuple(MATRICES)
    sizes: tuple[float, ...] = SIZES  # of steps, in the spectral norm of each part
    normal: Callable[..., Any] | None = None  # (rng, point) → normal vector
    retraction: Callable[..., Any] | None = None  # (point, tangent) → embedded point
    geodesic: Callable[..., Any] | None = None  # of one matrix, to several times
    order: int = 0  # slope of the distance from the geodesic, 0 where there is none
    embed: Callable[..., Any] = lambda x: x
    velocity: Callable[..., Any] = lambda x, v: v
    pull: Callable[..., Any] = lambda x, g: g  # ∇f at the embedding → what autodiff has
    isometric: bool = False
    lapack: bool = False

    @property
    def stacked(self):
        """The shape with leading axes."""
        return max(self.shapes, key=len)

    def ambient(self, rng, x):
        return jax.tree.map(lambda part: rng.normal(size=part.shape), x)


def trace(x, u, v):
    return np.sum(u * v, (-2, -1))


def stiefel_point(rng, shape):
    return each(reference.qr, rng.normal(size=shape))


def stiefel_tangent(rng, x):
    """XΩ and a part orthogonal to X."""
    w = rng.normal(size=x.shape)
    skew = rng.normal(size=(*x.shape[:-2], x.shape[-1], x.shape[-1]))
    return w - x @ (x.mT @ w) + x @ (skew - skew.mT)


def stiefel_normal(rng, x):
    s = rng.normal(size=(*x.shape[:-2], x.shape[-1], x.shape[-1]))
    return x @ (s + s.mT)


# Against the geodesic of each metric: t³ where the retraction is second order, t²
# where it is not. A wrong label fails either way.
ORDERS = {
    ("polar", "euclidean"): 3,
    ("polar", "canonical"): 2,
    ("qr", "euclidean"): 2,
    ("qr", "canonical"): 2,
    ("cayley", "euclidean"): 2,
    ("cayley", "canonical"): 3,
}


def stiefel(retraction, metric):
    def inner(x, u, v):
        flat = [a.reshape(-1, *a.shape[-2:]) for a in (x, u, v)]
        values = [
            reference.inner(p, a, b, metric) for p, a, b in zip(*flat, strict=True)
        ]
        return np.reshape(values, x.shape[:-2])

    return Row(
        ml.Stiefel(retraction, metric),
        stiefel_point,
        stiefel_tangent,
        lambda x, z: each(reference.projection, x, z),
        inner,
        normal=stiefel_normal,
        retraction=reference.stiefel_retraction(retraction, metric),
        geodesic=lambda x, v, ts: reference.geodesic(x, v, ts, metric),
        order=ORDERS.get((retraction, metric), 0),
    )


def oblique(retraction):
    def project(x, z):
        return each(reference.sphere_projection, x, z)

    retractions = {
        "normalise": lambda x, v: reference.unit_columns(x + v),
        "exp": lambda x, v: each(reference.great_circle, x, v),
    }
    return Row(
        Oblique(retraction),
        lambda rng, shape: reference.unit_columns(rng.normal(size=shape)),
        lambda rng, x: project(x, rng.normal(size=x.shape)),
        project,
        trace,
        shapes=[(3, 5), *MATRICES[1:]],
        normal=lambda rng, x: x * rng.normal(size=(*x.shape[:-2], 1, x.shape[-1])),
        retraction=retractions[retraction],
        geodesic=lambda x, v, ts: np.stack(
            [reference.great_circle(x, t * v) for t in ts]
        ),
        order=3 if retraction == "normalise" else 0,
        isometric=retraction == "exp",
    )


EUCLIDEAN = Row(
    ml.Euclidean(),
    lambda rng, shape: rng.normal(size=shape),
    lambda rng, x: rng.normal(size=x.shape),
    lambda x, z: z,
    trace,
    retraction=lambda x, v: x + v,
    isometric=True,
)


def fixed_rank(retraction):
    def pull(x, g):  # the pair, not the gradients by the factors
        return {"u": g @ x["v"], "s": x["u"].mT @ g @ x["v"], "v": g.mT @ x["u"]}

    ref = reference_fixed_rank
    return Row(
        FixedRank(retraction),
        ref.draw,
        ref.tangent,
        ref.projection,
        lambda x, u, v: trace(x, ref.dense_tangent(x, u), ref.dense_tangent(x, v)),
        shapes=PRODUCTS,
        sizes=tuple(min(size, 0.4) for size in SIZES),  # S + M must stay invertible
        retraction=getattr(ref, f"retract_{retraction}"),
        embed=ref.dense,
        velocity=ref.dense_tangent,
        pull=pull,
        lapack=retraction == "truncation",
    )


def bounded_rank(order):
    ref = reference_bounded_rank

    def pair(w, p):
        """(W, √α P) side by side, of one height."""
        height = max(w.shape[-2], p.shape[-2])
        tall = [
            np.pad(a, [(0, 0)] * (a.ndim - 2) + [(0, height - a.shape[-2]), (0, 0)])
            for a in (w, p * ref.ALPHA**0.5)
        ]
        return np.concatenate(tall, -1)

    def velocity(x, v):
        return pair(*ref.dense_tangent(x, v))

    def pull(x, g):  # a function of P as well as of W, through V
        m, n = x["a"].shape[-2], x["v"].shape[-2]
        g, h = g[..., :m, :n], g[..., :n, n:] * ref.ALPHA**0.5
        return {"a": g @ x["v"], "v": g.mT @ x["a"] - (h + h.mT) @ x["v"]}

    def normal(rng, x):
        r = x["v"].shape[-1]
        s = rng.normal(size=(*x["v"].shape[:-2], r, r))
        return {"a": 0 * x["a"], "v": x["v"] @ s}

    return Row(
        BoundedRank(order=order),
        ref.draw,
        ref.tangent,
        lambda x, z: velocity(x, ref.projection(x, z)),
        ref.inner,
        shapes=PRODUCTS,
        normal=normal,
        embed=lambda x: pair(*ref.dense(x)),
        velocity=velocity,
        pull=pull,
    )


STIEFEL = {
    f"stiefel-{retraction}-{metric}": stiefel(retraction, metric)
    for retraction in ("polar", "qr", "cayley", "exp")
    for metric in ("canonical", "euclidean")
}
ROWS = {
    **STIEFEL,
    "oblique-normalise": oblique("normalise"),
    "oblique-exp": oblique("exp"),
    "euclidean": EUCLIDEAN,
    "fixed_rank-truncation": fixed_rank("truncation"),
    "fixed_rank-orthographic": fixed_rank("orthographic"),
    "bounded_rank-1": bounded_rank(1),
    "bounded_rank-2": bounded_rank(2),
}
# The metric affects only the retraction exp, and the retraction no projection.
SAME_RETRACTION = {f"stiefel-{name}-euclidean" for name in ("polar", "qr", "cayley")}
RETRACTIONS = [name for name in ROWS if name not in SAME_RETRACTION]
PRODUCTS_ONLY = [name for name in RETRACTIONS if not ROWS[name].lapack]
GEOMETRIES = [
    "stiefel-polar-canonical",
    "stiefel-polar-euclidean",
    "oblique-normalise",
    "oblique-exp",
    "euclidean",
    "fixed_rank-orthographic",
    "bounded_rank-1",
]


def slow_if(condition):
    return [pytest.mark.slow] if condition else []


def over(names, quick=None):
    """Parametrise by rows, of which only the quick ones are in the default run."""
    rows = [
        pytest.param(ROWS[name], id=name, marks=slow_if(quick and name not in quick))
        for name in names
    ]
    return pytest.mark.parametrize("row", rows)


def over_shapes(names):
    """Parametrise by rows × shapes, in float64, and once in float32.

    Shapes without leading axes are not in the default run.
    """
    rows = [
        pytest.param(
            ROWS[name],
            shape,
            dtype,
            id=f"{name}-{shape}-{dtype}",
            marks=slow_if(shape != ROWS[name].stacked),
        )
        for name in names
        for shape in ROWS[name].shapes
        for dtype in ("float64", "float32")
        if dtype == "float64" or shape == ROWS[name].stacked
    ]
    return pytest.mark.parametrize(("row", "shape", "dtype"), rows)


# Arithmetic on points and tangents of either kind.


@contextlib.contextmanager
def precision(dtype):
    with jax.enable_x64(dtype == "float64"):
        yield TOLERANCE[dtype]


def float64(tree):
    return jax.tree.map(lambda a: np.asarray(a, np.float64), tree)


def cast(tree, dtype):
    return jax.tree.map(lambda a: jnp.asarray(a, dtype), tree)


def close(a, b, tolerance, scale=1.0):
    a, b = np.broadcast_arrays(float64(a), float64(b))
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(scale, 1))


def pick(tree, index):
    return jax.tree.map(lambda a: a[index], tree)


def scaled(t, v):
    return jax.tree.map(lambda a: t * a, v)


def combine(a, u, v):
    return jax.tree.map(lambda u, v: a * u + v, u, v)


def shapes(tree):
    return jax.tree.map(lambda a: a.shape, tree)


def unit(v):
    """Every part with spectral norm 1, or 0 where there is nothing."""
    norm = functools.partial(np.linalg.norm, ord=2, axis=(-2, -1), keepdims=True)
    return jax.tree.map(lambda a: a / np.maximum(norm(a), 1e-30), v)


def norms(a, batch):
    """Frobenius norms over the axes after the first `batch`."""
    return np.sqrt(np.sum(a**2, axis=tuple(range(batch, a.ndim))))


def along(x, v, steps):
    """x and t·v for all steps t, on a new leading axis."""
    xs = jax.tree.map(lambda a: np.stack([a] * len(steps)), x)
    return xs, jax.tree.map(lambda a: np.stack([t * a for t in steps]), v)
