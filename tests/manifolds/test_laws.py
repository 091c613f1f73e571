"""The laws of geometry, each once, over the table of manifolds.

References are float64 NumPy and SciPy (table.py, reference.py), never the code
under test. One jitted call per law, since compilation takes most of the time.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.manifolds.table import (
    FEASIBLE,
    GEOMETRIES,
    PRODUCTS_ONLY,
    RETRACTIONS,
    ROWS,
    along,
    cast,
    close,
    combine,
    float64,
    norms,
    over,
    over_shapes,
    pick,
    precision,
    scaled,
    shapes,
    unit,
)
from tests.tolerances import FLOAT32, FLOAT64, RESIDUAL, SLOPE

DIFFERENCE = 1e-7  # central differences of step 1e-5 in float64
STEPS = np.geomspace(1e-3, 1e-1, 10)
# Of a law that takes long to compile, in the default run.
FEW = ["stiefel-polar-canonical", "oblique-normalise", "bounded_rank-1"]
EMBEDDED = [name for name in GEOMETRIES if "canonical" not in name]


@functools.cache
def retract(manifold):
    """The jitted retraction, one for all laws."""
    return jax.jit(manifold.retract)


def retracted(row, x, v, dtype):
    return retract(row.manifold)(cast(x, dtype), cast(v, dtype))


@functools.cache
def geometry(manifold):
    """All operations but the retraction, in one program."""

    def maps(x, y, z1, z2, u, v, g, normal):
        project, inner = manifold.project, manifold.inner
        p1, p2 = project(x, z1), project(x, z2)
        return {
            "p1": p1,
            "p1 again": project(x, p1),
            "p2": p2,
            "p(2z1 + z2)": project(x, combine(2.0, z1, z2)),
            "p(normal)": project(x, normal),
            "gradient": manifold.riemannian_gradient(x, g),
            "⟨u, v⟩": inner(x, u, v),
            "⟨v, u⟩": inner(x, v, u),
            "⟨u, u⟩": inner(x, u, u),
            "|u|": manifold.norm(x, u),
            "⟨p1, z2⟩": inner(x, p1, z2),
            "⟨z1, p2⟩": inner(x, z1, p2),
            "Tu": manifold.transport(x, y, u),
            "Tv": manifold.transport(x, y, v),
            "T(2u + v)": manifold.transport(x, y, combine(2.0, u, v)),
            "Tu at x": manifold.transport(x, x, u),
            "residual": manifold.residual(x),
        }

    return jax.jit(maps)


@pytest.mark.smoke
@over_shapes(GEOMETRIES)
def test_projection_metric_gradient_and_transport(row, shape, dtype):
    rng = np.random.default_rng(0)
    with precision(dtype) as tolerance:
        x, y = (row.draw(rng, shape) for _ in range(2))
        z1, z2 = row.ambient(rng, x), row.ambient(rng, x)
        u, v = row.tangent(rng, x), row.tangent(rng, x)
        normal = row.normal(rng, x) if row.normal else scaled(0, z1)
        w = rng.normal(size=row.embed(x).shape)
        g = jax.grad(lambda e: jnp.sum(jnp.sin(e * w) + e * w))(row.embed(x))
        arguments = (x, y, z1, z2, u, v, row.pull(x, float64(g)), normal)
        arguments = cast(arguments, dtype)
        out = float64(geometry(row.manifold)(*arguments))
        x, y, z1, z2, u, v, _, normal = float64(arguments)
        scale = 4 * np.prod(jax.tree.leaves(x)[-1].shape[-2:])
        assert shapes(out["p1"]) == shapes(out["Tu"]) == shapes(x)
        assert out["residual"].shape == out["⟨u, v⟩"].shape
        assert (out["residual"] < FEASIBLE[dtype]).all()

        # The projection is the nearest tangent, hence tangent.
        close(row.velocity(x, out["p1"]), row.projection(x, z1), tolerance, 10)
        jax.tree.map(
            lambda a, b: close(a, b, tolerance, 10), out["p1"], out["p1 again"]
        )
        linear = combine(2, out["p1"], out["p2"])
        jax.tree.map(
            lambda a, b: close(a, b, tolerance, 30), out["p(2z1 + z2)"], linear
        )
        jax.tree.map(lambda a: close(a, 0, tolerance, 30), out["p(normal)"])
        close(out["⟨p1, z2⟩"], out["⟨z1, p2⟩"], tolerance, scale)

        # The metric, and the gradient as the dual of the differential.
        close(out["⟨u, v⟩"], row.inner(x, u, v), tolerance, scale)
        close(out["⟨u, v⟩"], out["⟨v, u⟩"], tolerance, scale)
        close(out["|u|"] ** 2, out["⟨u, u⟩"], tolerance, scale)
        assert (out["⟨u, u⟩"] > 0).all()
        gradient = out["gradient"]
        batch = out["residual"].ndim
        moves = row.velocity(x, u) * float64(g)
        differential = moves.sum(axis=tuple(range(batch, moves.ndim)))
        close(row.inner(x, gradient, u), differential, tolerance, 10 * scale)
        close(row.velocity(x, gradient), row.projection(x, gradient), tolerance, 30)

        # The transport is tangent at y, linear, the identity from x to x, and keeps
        # lengths or at least does not expand them.
        moved = row.velocity(y, out["Tu"])
        close(moved, row.projection(y, out["Tu"]), tolerance, 10)
        linear = combine(2, out["Tu"], out["Tv"])
        jax.tree.map(lambda a, b: close(a, b, tolerance, 30), out["T(2u + v)"], linear)
        jax.tree.map(lambda a, b: close(a, b, tolerance, 10), out["Tu at x"], u)
        before, after = norms(row.velocity(x, u), batch), norms(moved, batch)
        assert (after <= before * (1 + 10 * tolerance)).all()
        if row.isometric:
            products = row.inner(y, out["Tu"], out["Tv"])
            close(products, out["⟨u, v⟩"], tolerance, scale)


def steps_of(row, shape, rng):
    """A point, and tangents of all sizes and of rank one, on a new leading axis."""
    x = row.draw(rng, shape)
    xs, vs = along(x, unit(row.tangent(rng, x)), row.sizes)
    z = row.ambient(rng, x)
    flat = jax.tree.map(lambda a: a[..., :1] @ a[..., :1, :], z)  # rank one
    tangent = row.manifold.project(cast(x, "float64"), cast(flat, "float64"))
    last = scaled(row.sizes[4], unit(float64(tangent)))
    xs = jax.tree.map(lambda a: np.concatenate([a, a[:1]]), xs)
    return xs, jax.tree.map(lambda a, b: np.concatenate([a, b[None]]), vs, last)


@over_shapes(RETRACTIONS)
def test_retraction_reaches_the_right_point(row, shape, dtype):
    with jax.enable_x64(True):
        x, v = steps_of(row, shape, np.random.default_rng(1))
    with precision(dtype) as tolerance:
        x, v = cast(x, dtype), cast(v, dtype)
        y = retracted(row, x, v, dtype)
        chex.assert_trees_all_equal_shapes_and_dtypes(y, x)
        residual = jnp.moveaxis(row.manifold.residual(y), 0, -1)
        assert (residual < FEASIBLE[dtype]).all(), residual
        chex.assert_trees_all_equal(pick(y, 0), pick(x, 0))
        if row.retraction is None:
            return
        expected = row.retraction(float64(x), float64(v))
        sizes = [*row.sizes, row.sizes[4]]
        # X + v is known to ε‖v‖ only.
        for got, want, size in zip(row.embed(float64(y)), expected, sizes, strict=True):
            close(got, want, tolerance, 4 * size)


def slope(errors, steps=STEPS):
    return np.polyfit(np.log(steps), np.log(errors), 1)[0]


def curve(row, sign=1):
    """A point, a tangent, and the points R(x, t·v) of all steps, in float64."""
    rng = np.random.default_rng(2)
    x = row.draw(rng, row.stacked)
    v = unit(row.tangent(rng, x))
    return x, v, float64(retracted(row, *along(x, v, sign * STEPS), "float64"))


@over(RETRACTIONS)
def test_first_order_defect_has_slope_two_through_zero(row):
    with precision("float64"):
        for sign in (1, -1):
            x, v, y = curve(row, sign)
            speed = row.velocity(x, v)
            linear = np.stack([row.embed(x) + sign * t * speed for t in STEPS])
            errors = norms(row.embed(y) - linear, 1)
            if row.manifold == ROWS["euclidean"].manifold:
                close(errors, 0, FLOAT64)
            else:
                assert abs(slope(errors) - 2) < SLOPE


def order_of(row):
    """The slope of the distance from the geodesic."""
    x, v, y = curve(row)
    first = (0,) * (x.ndim - 2)
    exact = row.geodesic(x[first], v[first], STEPS)
    return slope(norms(y[(slice(None), *first)] - exact, 1))


@over([name for name, row in ROWS.items() if row.order])
def test_order_of_the_retraction(row):
    with precision("float64"):
        assert abs(order_of(row) - row.order) < SLOPE


@over([name for name, row in ROWS.items() if row.geodesic and not row.order])
def test_exponential_is_the_geodesic(row):
    with precision("float64"):
        x, v, y = curve(row)
        first = (0,) * (x.ndim - 2)
        exact = row.geodesic(x[first], v[first], STEPS)
        close(y[(slice(None), *first)], exact, FLOAT64, 10)


@over(EMBEDDED)
def test_transport_is_parallel_to_first_order(row):
    # The tangential part of the derivative of the carried vector is zero.
    with precision("float64"):
        x, v, y = curve(row)
        w = unit(row.tangent(np.random.default_rng(3), x))
        transport = jax.jit(jax.vmap(row.manifold.transport, in_axes=(None, 0, None)))
        moved = transport(cast(x, "float64"), cast(y, "float64"), cast(w, "float64"))
        if isinstance(x, dict):  # a transport by projection, there and back
            back = jax.jit(jax.vmap(row.manifold.transport, in_axes=(0, None, 0)))
            moved = back(cast(y, "float64"), cast(x, "float64"), moved)
        start, moved = row.velocity(x, w), float64(moved)
        ends = [row.projection(x, pick(moved, i)) for i in range(len(STEPS))]
        errors = norms(np.stack(ends) - start, 1)
        if row.manifold == ROWS["euclidean"].manifold:
            close(errors, 0, FLOAT64)
        else:
            assert abs(slope(errors) - 2) < SLOPE


# Not of LAPACK's SVD: singular values coincide at 0, where it has no derivative.
@over(PRODUCTS_ONLY, FEW)
def test_derivative_of_the_retraction(row):
    with precision("float64"):
        rng = np.random.default_rng(4)
        x = row.draw(rng, row.shapes[-1])
        v, w = (scaled(0.3, unit(row.tangent(rng, x))) for _ in range(2))
        h = 1e-5
        points, _ = along(x, v, STEPS)
        hs = np.resize([h, -h], len(STEPS))  # as many as in the other laws
        ends = jax.tree.map(lambda v, w: np.stack([v + h * w for h in hs]), v, w)
        ends = float64(retracted(row, points, ends, "float64"))
        x, v, w = cast((x, v, w), "float64")

        @jax.jit
        def derivative(v):
            return jax.jvp(lambda v: row.manifold.retract(x, v), (v,), (w,))[1]

        forward = derivative(v)
        difference = jax.tree.map(lambda a: (a[0] - a[1]) / (2 * h), ends)
        jax.tree.map(lambda a, b: close(a, b, DIFFERENCE), forward, difference)
        at_zero, x, w = float64((derivative(scaled(0.0, v)), x, w))
        ends = [row.embed(combine(t, at_zero, x)) for t in (h, -h)]
        close((ends[0] - ends[1]) / (2 * h), row.velocity(x, w), DIFFERENCE)


@over([n for n in RETRACTIONS if n.startswith(("stiefel-p", "oblique"))], FEW)
def test_reverse_derivative_is_the_transpose(row):
    rng = np.random.default_rng(4)
    x = row.draw(rng, row.shapes[-1])
    v, w, g = (scaled(0.3, unit(row.tangent(rng, x))) for _ in range(3))
    x, v, w, g = cast((x, v, w, g), "float32")

    @jax.jit
    def both(x, v, w, g):
        reached, forward = jax.jvp(lambda v: row.manifold.retract(x, v), (v,), (w,))
        reverse = jax.vjp(lambda v: row.manifold.retract(x, v), v)[1](g)[0]
        return jnp.vdot(forward, g), jnp.vdot(reverse, w)

    along_g, along_w = both(x, v, w, g)
    close(along_g, along_w, FLOAT32)


@over(PRODUCTS_ONLY, FEW)
def test_batch_is_a_loop_and_vmap_and_step(row):
    # Points of dicts are compared as matrices: a gauge may change sign.
    rng = np.random.default_rng(5)
    manifold, shape = row.manifold, row.stacked
    x = row.draw(rng, (len(STEPS), *shape))
    d = scaled(0.1, row.ambient(rng, x))
    v = jax.jit(manifold.project)(*cast((x, d), "float32"))
    other = row.draw(rng, (*shape[:-2], shape[-2] + 2, shape[-1]))  # of other rows
    e = scaled(0.1, row.ambient(rng, other))
    x, d, other, e = cast((x, d, other, e), "float32")
    small = cast((pick(x, 1), pick(v, 1)), "bfloat16")
    x, v = jax.tree.map(lambda a, b: a.at[1].set(b), (x, v), small)
    reached = retract(manifold)(x, v)
    expected = row.embed(float64(reached))

    @jax.jit
    def ways(x, v, xs, ds, small):
        mapped = jax.vmap(jax.vmap(manifold.retract))(x, v)
        return mapped, manifold.step(xs, ds), manifold.retract(*small)

    x, v, d = pick((x, v, d), 0)
    mapped, steps, rounded = ways(x, v, [x, other], [d, e], small)
    close(row.embed(float64(mapped)), expected[0], FLOAT32)
    close(row.embed(float64(steps[0])), expected[0], FLOAT32, 2)
    if row.retraction:  # at fixed rank of any triple, elsewhere of tangents
        other, e = float64((other, e))
        tangent = e if isinstance(e, dict) else row.projection(other, e)
        close(row.embed(float64(steps[1])), row.retraction(other, tangent), FLOAT32, 2)
    # In bfloat16 only storage is rounded.
    chex.assert_trees_all_equal(rounded, cast(pick(reached, 1), "bfloat16"))
    assert all(a.dtype == jnp.bfloat16 for a in jax.tree.leaves(rounded))


@over(GEOMETRIES)
def test_bfloat16_is_computed_in_float32(row):
    rng = np.random.default_rng(6)
    x = row.draw(rng, row.stacked)
    x, v = cast((x, row.tangent(rng, x)), "bfloat16")
    m = row.manifold

    def maps(x, v):
        return m.project(x, v), m.riemannian_gradient(x, v), m.transport(x, x, v)

    got, rounded = maps(x, v), cast(maps(*cast((x, v), "float32")), "bfloat16")
    assert all(a.dtype == jnp.bfloat16 for a in jax.tree.leaves(got))
    chex.assert_trees_all_equal(got, rounded)


@over([name for name in RETRACTIONS if name != "euclidean"])
def test_drift_is_repaired_and_nan_stays_where_it_is(row):
    rng = np.random.default_rng(1)
    with jax.enable_x64(True):
        x, v = steps_of(row, row.stacked, rng)
    drifted = combine(1e-3, row.ambient(rng, x), x)
    assert (row.manifold.residual(cast(drifted, "float32")) > 1e-4).all()
    y = retracted(row, drifted, v, "float32")
    sizes = np.array([*row.sizes, row.sizes[4]])
    repaired = (sizes > 0) & (sizes <= 1)
    assert (row.manifold.residual(y)[repaired] < RESIDUAL).all()
    for part in jax.tree.leaves(v):
        part[3, 0, 0] = np.nan
    v = pick(v, np.minimum(np.arange(len(sizes)), 5))
    for part in jax.tree.leaves(retracted(row, x, v, "float32")):
        finite = np.isfinite(part).all(axis=(-2, -1))
        assert not finite[3, 0, 0] and finite.sum() == finite.size - 1


@over([n for n in RETRACTIONS if n.startswith(("stiefel", "oblique"))], FEW)
def test_two_thousand_float32_steps(row):
    x = cast(row.draw(np.random.default_rng(7), (40, 4)), "float32")

    def step(x, key):
        size = 10.0 ** jax.random.uniform(key, minval=-5, maxval=0.5)
        d = size * row.manifold.random_tangent(key, x)
        (x,) = row.manifold.step([x], [d])
        return x, row.manifold.residual(x).max()

    keys = jax.random.split(jax.random.key(1), 2000)
    _, residuals = jax.jit(lambda x, keys: jax.lax.scan(step, x, keys))(x, keys)
    assert residuals.max() < RESIDUAL


@over([name for name in GEOMETRIES if "rank" not in name])
def test_random_point_and_tangent(row):
    manifold = row.manifold

    @jax.jit
    def make(key, other):
        x = manifold.random_point(key, row.stacked)
        return x, manifold.random_tangent(other, x)

    x, v = make(*jax.random.split(jax.random.key(0)))
    assert (
        shapes(x)
        == shapes(v)
        == shapes(row.draw(np.random.default_rng(0), row.stacked))
    )
    assert all(a.dtype == jnp.float32 for a in jax.tree.leaves((x, v)))
    assert (manifold.residual(x) < RESIDUAL).all()
    x, v = float64((x, v))
    close(row.velocity(x, v), row.projection(x, v), FLOAT32, 4)
    assert norms(row.velocity(x, v), 2).min() > 0.1
