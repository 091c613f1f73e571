"""A step of any finite length ends on the manifold, and reaches the limit of long ones.

Lengths are log-uniform over all of float32; directions are ordinary, of rank one, a
single entry, graded, normal to the manifold, or zero.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cases import slow_but
from tests.manifolds.reference import each, qr
from tests.manifolds.table import PRODUCTS_ONLY, RETRACTIONS, ROWS, cast, float64
from tests.tolerances import ANY_STEP, BFLOAT16, FLOAT32

BATCH = 16
LARGEST = float(np.finfo("float32").max)
KINDS = ("normal", "rank one", "entry", "graded", "along x", "zero")
CONSTRAINED = [name for name in RETRACTIONS if name != "euclidean"]


def small(row):
    return (7, 8, 3) if row.manifold.parts else (7, 3)


def direction(rng, kind, x):
    """A matrix or batch of them with largest entry 1."""
    z = rng.normal(size=x.shape)
    if kind == "rank one":
        z = z[..., :1] * z[..., :1, :]
    elif kind == "entry":
        z = np.zeros_like(z)
        z[..., rng.integers(z.shape[-2]), rng.integers(z.shape[-1])] = 1
    elif kind == "graded":
        z = z * np.geomspace(1, 1e-7, z.shape[-1])
    elif kind == "along x":
        z = x @ (z[..., : x.shape[-1], :] + z[..., : x.shape[-1], :].mT)
    elif kind == "zero":
        z = np.zeros_like(z)
    return z / max(np.abs(z).max(), 1e-30)


def displacements(rng, kinds, exponents, x):
    """One ambient displacement for each point of a batch, of that kind and size."""
    parts = jax.tree.leaves(x)
    structure = jax.tree.structure(x)
    columns = []
    for kind, exponent, i in zip(kinds, exponents, range(BATCH), strict=True):
        size = min(10.0**exponent, LARGEST)
        columns.append([size * direction(rng, kind, part[i]) for part in parts])
    return structure.unflatten(
        [np.stack(part).astype("float32") for part in zip(*columns, strict=True)]
    )


@functools.cache
def program(manifold):
    def reached(x, d):
        (y,) = manifold.step([x], [d])
        return y, manifold.residual(y)

    return jax.jit(reached)


drawn = given(
    seed=st.integers(0, 2**32 - 1),
    kinds=st.lists(st.sampled_from(KINDS), min_size=BATCH, max_size=BATCH),
    exponents=st.lists(st.floats(-45, 38.53), min_size=BATCH, max_size=BATCH),
)
few = settings(max_examples=12, deadline=None, derandomize=True, database=None)


@pytest.mark.parametrize("name", CONSTRAINED)
@few
@drawn
def test_every_finite_step_stays_on_the_manifold(name, seed, kinds, exponents):
    row, rng = ROWS[name], np.random.default_rng(seed)
    x = row.draw(rng, (BATCH, *small(row)))
    d = displacements(rng, kinds, exponents, x)
    y, residual = program(row.manifold)(cast(x, "float32"), d)
    assert all(np.isfinite(part).all() for part in jax.tree.leaves(y))
    worst = int(np.argmax(residual))
    assert residual.max() < ANY_STEP, (kinds[worst], exponents[worst])


# "exp" repairs the drift of a stored bfloat16 point up to some hundred radians only.
@pytest.mark.parametrize("name", [n for n in CONSTRAINED if "stiefel-exp" not in n])
def test_long_steps_of_bfloat16_points(name):
    row, rng = ROWS[name], np.random.default_rng(0)
    x = row.draw(rng, (BATCH, *small(row)))
    d = displacements(rng, ["normal"] * BATCH, np.linspace(-40, 38, BATCH), x)
    x, d = cast((x, d), "bfloat16")
    (y,) = jax.jit(row.manifold.step)([x], [d])
    assert all(a.dtype == jnp.bfloat16 for a in jax.tree.leaves(y))
    assert (row.manifold.residual(y) < 3 * BFLOAT16).all()


@pytest.mark.parametrize("retraction", ["polar", "qr"])
def test_long_steps_tend_to_the_orthonormal_direction(retraction):
    # X + tv → tv: the polar or QR factor of v itself, and 1/512 away from c on.
    rng = np.random.default_rng(1)
    row = ROWS[f"stiefel-{retraction}-canonical"]
    x = row.draw(rng, (4, 9, 3))
    v = row.tangent(rng, x)
    factors = {"qr": lambda v: each(qr, v), "polar": polar}
    limit = factors[retraction](v)
    for size in (1e6, 1e20, 1e37, 8e37):
        y = jax.jit(row.manifold.retract)(*cast((x, size * v), "float32"))
        smallest = np.linalg.svd(v, compute_uv=False).min() / np.linalg.norm(v)
        assert np.abs(float64(y) - limit).max() < 4 / (512 * smallest)


def polar(v):
    u, _, w = np.linalg.svd(v, full_matrices=False)
    return u @ w


def test_great_circles_of_any_length_stay_in_their_plane():
    rng = np.random.default_rng(2)
    row = ROWS["oblique-exp"]
    x = row.draw(rng, (9, 3))
    v = row.tangent(rng, x)
    y = float64(row.manifold.retract(*cast((x, 1e30 * v), "float32")))
    for j in range(3):
        plane = np.linalg.qr(np.stack([x[:, j], v[:, j]], -1))[0]
        rest = y[:, j] - plane @ (plane.T @ y[:, j])
        assert np.abs(rest).max() < FLOAT32


# A truncation has no derivative where singular values coincide.
STEP = 1e-6  # of central differences in float64
SMOOTH = [n for n in CONSTRAINED if n in PRODUCTS_ONLY]


@pytest.mark.parametrize(
    "name",
    slow_but(["stiefel-cayley-canonical", "oblique-exp", "bounded_rank-1"], SMOOTH),
)
def test_derivatives_at_zero_are_finite_and_transposes(name):
    row, rng = ROWS[name], np.random.default_rng(3)
    shape = row.shapes[-1]
    x = row.draw(rng, shape)
    w, g = row.tangent(rng, x), row.tangent(rng, x)
    x, w, g = cast((x, w, g), "float32")
    zero = jax.tree.map(jnp.zeros_like, w)

    @jax.jit
    def both(v):
        f = functools.partial(row.manifold.retract, x)
        return jax.jvp(f, (v,), (w,))[1], jax.vjp(f, v)[1](g)[0]

    forward, reverse = both(zero)
    products = [
        sum(
            np.sum(float64(p) * float64(q))
            for p, q in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        )
        for a, b in ((forward, g), (reverse, w))
    ]
    assert abs(products[0] - products[1]) < FLOAT32 * (10 + abs(products[0]))
    with jax.enable_x64(True):
        xs, ws = cast((x, w), "float64")
        ends = [
            row.manifold.retract(xs, jax.tree.map(lambda a, t=t: t * a, ws))
            for t in (STEP, -STEP)
        ]
    differences = jax.tree.map(
        lambda a, b: (np.asarray(a) - np.asarray(b)) / (2 * STEP), *ends
    )
    for a, b in zip(
        jax.tree.leaves(forward), jax.tree.leaves(differences), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "name",
    slow_but(
        ["stiefel-polar-canonical", "oblique-exp"],
        [n for n in SMOOTH if n.startswith(("stiefel", "obl"))],
    ),
)
def test_transports_at_zero_have_derivatives(name):
    row, rng = ROWS[name], np.random.default_rng(4)
    x = row.draw(rng, (6, 3))
    w = row.tangent(rng, x)
    x, w = cast((x, w), "float32")

    def length(v):
        y = row.manifold.retract(x, v)
        return jnp.sum(row.manifold.transport(x, y, w) ** 2)

    gradient = jax.jit(jax.grad(length))(0 * w)
    assert np.isfinite(gradient).all()
