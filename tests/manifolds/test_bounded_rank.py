"""BoundedRank against LoRAM's algorithms in dense float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from manifold_lora.errors import InputError
from manifold_lora.manifolds import Manifold
from manifold_lora.manifolds.bounded_rank import BoundedRank
from manifold_lora.optimizers import riemannian
from tests.manifolds import reference_bounded_rank as reference
from tests.tolerances import FLOAT32, FLOAT64, RESIDUAL, SLOPE

TOLERANCE = {"float32": FLOAT32, "float64": FLOAT64}
SIZES = np.array([0, 1e-6, 1e-3, 0.3, 0.6, 1.0, 10.0, 100.0])
STEPS = np.geomspace(1e-2, 1e-1, len(SIZES))  # one shape, one compilation
# Batched; V square; fewer rows than columns in A; one column.
SHAPES = [(2, 7, 6, 3), (4, 3, 3), (2, 6, 3), (5, 4, 1)]
ORDERS = [BoundedRank(), BoundedRank(order=2), BoundedRank(alpha=2.0, order=2)]

each_order = pytest.mark.parametrize("manifold", ORDERS, ids=str)


@functools.cache
def jitted(manifold, name):
    return jax.jit(getattr(manifold, name))


def like(p, dtype="float64"):
    return {k: jnp.asarray(x, dtype) for k, x in p.items()}


def float64(p):
    return {k: np.asarray(x, np.float64) for k, x in p.items()}


def close(a, b, tolerance=FLOAT64, scale=1.0):
    """Arrays, dicts or pairs of them."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * max(scale, 1))


def times(c, p):
    return {k: np.reshape(c, (-1, 1, 1)) * x for k, x in p.items()}


def both(f, *points):
    return jax.tree.map(f, *map(float64, points))


def case(shape=(7, 6, 3), seed=0):
    """A point, an ambient vector and a tangent of spectral norm 1 in V."""
    rng = np.random.default_rng(seed)
    x = reference.draw(rng, shape)
    z, v = reference.ambient(rng, x), reference.tangent(rng, x)
    size = np.linalg.norm(v["v"], 2, (-2, -1), keepdims=True)
    v["v"] = v["v"] / np.where(size > 1e-9, size, np.inf)
    return x, z, v


def repeat(x, n):
    return {k: np.repeat(p[None], n, 0) for k, p in x.items()}


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [(SHAPES[0], "float32"), *((shape, "float64") for shape in SHAPES)],
    ids=str,
)
def test_projection_and_metric(shape, dtype):
    with jax.enable_x64(dtype == "float64"):
        x, z, v = (like(p, dtype) for p in case(shape))
        normal = {"a": 0 * z["a"], "v": x["v"] @ z["v"][..., : shape[-1], :]}
        manifold, inner = BoundedRank(), BoundedRank().inner

        @jax.jit
        def maps(x, z, v, normal):
            y = jax.tree.map(lambda x: jnp.flip(x, -2), z)
            p, q, zero = (manifold.project(x, w) for w in (z, y, normal))
            again = manifold.project(x, p)
            products = inner(x, p, v), inner(x, v, p), inner(x, p, y), inner(x, z, q)
            return p, again, zero, products, (inner(x, p, p), manifold.norm(x, p) ** 2)

        p, again, zero, products, squares = maps(x, z, v, normal)
        tolerance, scale = 4 * TOLERANCE[dtype], 10 * shape[-2] * shape[-1]
        close(p, reference.projection(float64(x), float64(z)), tolerance)
        close(again, p, tolerance)
        close(zero, both(np.zeros_like, zero), tolerance)
        expected = reference.inner(float64(x), float64(p), float64(v))
        close(products[:2], (expected, expected), tolerance, scale)
        close(products[2], products[3], tolerance, scale)  # self-adjoint
        close(squares[0], squares[1], tolerance, scale)
        assert (squares[0] > 0).all() and squares[0].shape == shape[:-3]


def law_gradient(manifold, shape):
    """Algorithm 6, and ⟨grad, ξ⟩ = Df[ξ]."""
    x, z, v = case(shape)
    target = z["a"] @ reference.t(z["v"])

    def f(x):
        w = x["a"] @ x["v"].mT
        return jnp.sum(jnp.sin(w * target) + w * target, (-2, -1))

    @jax.jit
    def maps(x, v):
        g = jax.grad(lambda x: f(x).sum())(x)
        return manifold.riemannian_gradient(x, g), jax.jvp(f, (x,), (v,))[1]

    gradient, differential = maps(like(x), like(v))
    w = x["a"] @ reference.t(x["v"])
    ambient = (np.cos(w * target) + 1) * target
    u, s, basis, turn = reference.paper(x)
    if u.shape[-1] == shape[-1]:  # the paper's U has r columns
        k, vp = reference.algorithm_6(u, s, basis, ambient, manifold.alpha)
        expected = {"a": k @ reference.t(turn), "v": vp @ reference.t(turn)}
        close(gradient, expected, scale=100)
    inner = reference.inner(x, float64(gradient), v, manifold.alpha)
    close(inner, differential, scale=100)
    inside = reference.t(x["v"]) @ float64(gradient)["v"]
    close(inside, np.zeros_like(inside), scale=100)


@pytest.mark.parametrize(
    ("alpha", "shape"), list(zip([0.5, 2.0, 0.5, 2.0], SHAPES, strict=True))
)
def test_gradient(alpha, shape):
    with jax.enable_x64(True):
        law_gradient(BoundedRank(alpha), shape)


def law_retraction(manifold, x, v):
    """Algorithm 7 (order 1) and the paper's (ΔW + ΔẆ)Q, along SIZES of v."""
    n = len(SIZES)
    xs, vs = repeat(x, n), times(SIZES, v)
    y = jitted(manifold, "retract")(like(xs), like(vs))
    close([y[k][0] for k in y], [x[k] for k in y], 0)  # R(x, 0) = x
    w, p = reference.dense(float64(y))
    eye = np.eye(len(x["v"]))
    if manifold.order == 1:
        u, s, basis, _ = reference.paper(xs)
        turn = reference.t(basis) @ xs["v"]
        k, vp = vs["a"] @ reference.t(turn), vs["v"] @ reference.t(turn)
        expected = reference.dense_paper(*reference.algorithm_7(u, s, basis, k, vp))
        bend = np.eye(x["v"].shape[1])
    else:
        expected = w, p
        gram = reference.t(xs["a"]) @ xs["a"]
        metric = 2 * manifold.alpha * np.eye(gram.shape[-1]) + gram
        c = reference.t(vs["a"]) @ xs["a"] @ np.linalg.inv(metric)
        size, gram = np.abs(c), np.abs(reference.t(vs["v"]) @ vs["v"])
        far = np.sqrt(np.sum(size * (gram @ size), axis=(-2, -1), keepdims=True))
        bend = np.eye(c.shape[-1]) - c / np.maximum(far / 2**11, 1)
    q, _ = np.linalg.qr(xs["v"] + vs["v"] @ bend)
    moved = reference.dense(xs)[0] + reference.dense_tangent(xs, vs)[0]
    close(p, eye - q @ reference.t(q), scale=100)
    for i, size in enumerate(SIZES):
        close(w[i], expected[0][i], scale=100 * size)
        close(w[i], (moved @ q @ reference.t(q))[i], scale=100 * size)
        close(p[i], expected[1][i], scale=100)
    # The first-order defect has slope 2 on both sides of zero.
    for sign in (1, -1):
        vs = times(sign * np.geomspace(1e-4, 1e-1, n), v)
        y = float64(jitted(manifold, "retract")(like(xs), like(vs)))
        ends = reference.dense(y), reference.dense(xs), reference.dense_tangent(xs, vs)
        for a, b, c in zip(*ends, strict=True):
            errors = np.linalg.norm(a - b - c, axis=(-2, -1))
            slope = np.polyfit(np.log(np.geomspace(1e-4, 1e-1, n)), np.log(errors), 1)
            assert abs(slope[0] - 2) < SLOPE


@each_order
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_retraction(manifold, rank):
    with jax.enable_x64(True):
        x, _, v = case()
        x["a"] = x["a"][:, :rank] @ x["a"][:rank]  # at A = 0 and near it
        law_retraction(manifold, x, v)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_retraction_of_other_shapes_in_float32(shape):
    x, _, v = (like(p, "float32") for p in case(shape))
    v = {"a": v["a"], "v": 3 * v["v"]}
    y = jitted(BoundedRank(), "retract")(x, v)
    x, v, y = float64(x), float64(v), float64(y)
    moved = reference.dense(x)[0] + reference.dense_tangent(x, v)[0]
    q, _ = np.linalg.qr(x["v"] + v["v"])
    close(reference.dense(y)[0], moved @ q @ reference.t(q), FLOAT32, scale=30)
    close(reference.t(y["v"]) @ y["v"], reference.t(q) @ q, RESIDUAL)


def law_order(manifold):
    """Against the integrated geodesic: t³ for order 2, and only t² for order 1."""
    x, _, v = case()
    exact = reference.geodesic(x, v, STEPS, manifold.alpha)
    xs = repeat(x, len(STEPS))
    y = jitted(manifold, "retract")(like(xs), like(times(STEPS, v)))
    w, p = reference.dense(float64(y))
    errors = [
        np.linalg.norm(reference.flat(w, p, manifold.alpha) - c)
        for w, p, c in zip(w, p, exact, strict=True)
    ]
    slope = np.polyfit(np.log(STEPS), np.log(errors), 1)[0]
    assert abs(slope - {1: 2, 2: 3}[manifold.order]) < SLOPE


@each_order
def test_order_of_the_retraction(manifold):
    with jax.enable_x64(True):
        law_order(manifold)


def law_transport(manifold, shape=(2, 7, 6, 3)):
    """Algorithm 8; tangent, linear, the identity from x to x, non-expansive."""
    x, z, v = case(shape)
    y, along = case(shape, seed=1)[0], reference.projection(x, z)

    def f(x, y, w):
        return float64(jitted(manifold, "transport")(like(x), like(y), like(w)))

    moved = f(x, y, along)
    (*old, turn), (*new, _) = reference.paper(x), reference.paper(y)
    factors = along["a"] @ turn, along["v"] @ turn
    k, vp = reference.algorithm_8(old, new, *factors, manifold.alpha)
    u, s, basis = new
    paper = reference.dense_tangent({"a": u @ s, "v": basis}, {"a": k, "v": vp})
    close(reference.dense_tangent(y, moved), paper, scale=100)
    close(reference.t(y["v"]) @ moved["v"], 0 * turn, scale=10)
    close(f(x, x, along), along, scale=10)
    total = f(x, y, both(lambda a, b: 2 * a - b, along, v))
    close(total, both(lambda a, b: 2 * a - b, moved, f(x, y, v)), scale=100)
    before, after = (
        reference.inner(p, w, w, manifold.alpha) for p, w in ((x, along), (y, moved))
    )
    assert (after <= before).all()


@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_transport(alpha):
    with jax.enable_x64(True):
        law_transport(BoundedRank(alpha))


@pytest.mark.parametrize("manifold", ORDERS[:2], ids=str)
def test_columns_may_be_rotated(manifold):
    with jax.enable_x64(True):
        points = case()
        q = np.linalg.qr(np.random.default_rng(5).normal(size=(3, 3)))[0]

        @jax.jit
        def maps(x, z, v):
            y = manifold.retract(x, v)
            gradient = manifold.riemannian_gradient(x, z)
            return y, manifold.transport(x, y, v), gradient

        rotated = maps(*(like(both(lambda p: p @ q, p)) for p in points))
        for got, expected in zip(rotated, maps(*map(like, points)), strict=True):
            close(got, both(lambda p: p @ q, expected), scale=100)


def test_columns_keep_their_identity():
    with jax.enable_x64(True):
        x, _, v = case()
        xs, vs = repeat(x, len(SIZES)), times(SIZES, v)
        y = jitted(BoundedRank(), "retract")(like(xs), like(vs))
        for part in ("a", "v"):
            moved = np.linalg.norm(np.asarray(y[part])[2] - x[part])
            assert moved < 2 * SIZES[2] * np.linalg.norm(v[part])


def test_float32_stays_on_the_manifold():
    manifold = ORDERS[1]
    x, _, _ = case((40, 30, 4))

    def step(x, drawn):
        size, v = drawn
        x = manifold.retract(x, {k: size * v[k] for k in v})
        x = {"a": x["a"] / jnp.linalg.norm(x["a"]), "v": x["v"]}
        return x, manifold.residual(x)

    rng = np.random.default_rng(0)
    sizes = 10 ** rng.uniform(-4, 2, 1000)
    vs = {k: rng.normal(size=(1000, *x[k].shape)) / x[k].size ** 0.5 for k in x}
    run = jax.jit(lambda x, *drawn: jax.lax.scan(step, x, drawn))
    args = jnp.asarray(sizes, "float32"), like(vs, "float32")
    _, residuals = run(like(x, "float32"), *args)
    assert residuals.max() < RESIDUAL


def test_vmap():
    with jax.enable_x64(True):
        x, _, v = case()
        xs, vs = like(repeat(x, len(SIZES))), like(times(SIZES, v))
        y = jax.jit(jax.vmap(ORDERS[1].retract))(xs, vs)
        close(y, jitted(ORDERS[1], "retract")(xs, vs), scale=100)


def test_step_of_several_points_is_projection_and_retraction():
    with jax.enable_x64(True):
        law_step(BoundedRank(order=2))


def law_step(manifold):
    """The fused step of points of several rows is R(x, P_x(d)) of each."""
    cases = [case(shape)[:2] for shape in ((7, 6, 3), (5, 9, 3))]
    xs, ds = ([like(p) for p in ps] for ps in zip(*cases, strict=True))
    fused, plain = jax.jit(lambda *lists: (
        manifold.step(*lists), Manifold.step(manifold, *lists)
    ))(xs, ds)  # fmt: skip
    close(fused, plain, scale=100)
    for y in map(float64, fused):
        close(reference.dense(y)[1] @ y["v"], np.zeros_like(y["v"]), scale=10)


def test_bfloat16_is_computed_in_float32():
    x, _, v = (like(p, "bfloat16") for p in case(SHAPES[0]))
    y = jitted(BoundedRank(), "retract")(x, v)
    assert {p.dtype for p in y.values()} == {jnp.dtype("bfloat16")}
    x, v = like(x, "float32"), like(v, "float32")
    exact = jitted(BoundedRank(), "retract")(x, v)
    close(y, {k: p.astype("bfloat16") for k, p in exact.items()}, 0)


def test_only_products_and_at_full_precision():
    manifold = BoundedRank(order=2)
    x, z, v = (like(p, "float32") for p in case())

    def maps(x, z, v):
        (y,) = manifold.step([x], [z])
        moved = manifold.transport(x, y, v), manifold.riemannian_gradient(x, z)
        return manifold.shrink(y, 0.1), moved

    with jax.default_matmul_precision("bfloat16"):
        text = jax.jit(maps).lower(x, z, v).as_text()
    assert "custom_call" not in text and "lapack" not in text
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert products and all("HIGHEST" in line for line in products)


def test_momentum_follows_algorithm_5():
    with jax.enable_x64(True):
        x, z, _ = case()
        target = z["a"] @ z["v"].T / 10
        tx = optax.chain(optax.ema(0.9, debias=False), optax.scale(-0.1))
        tx = riemannian(tx, BoundedRank(), transport=True)

        @jax.jit
        def step(x, state):
            g = jax.grad(lambda x: jnp.sum((x["a"] @ x["v"].T - target) ** 2) / 2)(x)
            updates, state = tx.update(g, state, x)
            return optax.apply_updates(x, updates), state

        y, state = like(x), jax.jit(tx.init)(like(x))
        for pair in reference.algorithm_5(x, lambda w: w - target, 0.1, 20):
            y, state = step(y, state)
            close(reference.dense(float64(y)), pair, scale=1e3)


def test_random_points():
    manifold = BoundedRank()

    @jax.jit
    def make(key):
        x = manifold.random_point(key, (2, 300, 20, 4))
        return x, manifold.random_tangent(key, x), manifold.residual(x)

    x, v, residual = make(jax.random.key(0))
    assert x["a"].shape == (2, 300, 4) and x["v"].shape == (2, 20, 4)
    assert residual.shape == (2,) and (residual < RESIDUAL).all()
    close(np.linalg.norm(x["a"], axis=-2), np.ones((2, 4)), 0.2)
    close(v["v"], reference.projection(float64(x), float64(v))["v"], FLOAT32, 4)
    assert np.abs(np.linalg.norm(v["a"]) - 2400**0.5) < 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BoundedRank(alpha=0.0), "alpha > 0, got 0.0"),
        (lambda: BoundedRank(order=3), "order 3"),  # pyright: ignore
        (lambda: check((4, 3), (5,)), "'v' of shape"),
        (lambda: check((4, 3), (5, 2)), "one rank"),
        (lambda: check((2, 4, 3), (5, 3)), "one batch"),
        (lambda: check((4, 3), (2, 3)), "rows ≥ columns"),
        (lambda: BoundedRank().random_point(jax.random.key(0), (4, 3)), "m, n, r"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(InputError, match=message):
        make()


def check(a, v):
    BoundedRank().check_shape({"a": a, "v": v})
