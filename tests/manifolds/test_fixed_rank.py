"""Fixed rank against dense m×n matrices in float64 (reference_fixed_rank.py)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import manifold_lora as ml
from manifold_lora.manifolds.fixed_rank import FixedRank
from tests.manifolds import reference_fixed_rank as reference
from tests.manifolds.fixed_rank_case import (
    BATCH,
    BOTH,
    CASES,
    GRADIENT,
    ONE,
    ORTHOGRAPHIC,
    PROJECT,
    RETRACT,
    TRANSPORT,
    TRUNCATION,
    WIDE,
    both,
    cast,
    close,
    draw,
    everything,
    pair,
    precision,
    scaled,
    spread,
    stack,
    table,
)
from tests.manifolds.reference_fixed_rank import dense, dense_tangent
from tests.tolerances import FLOAT32, FLOAT64, RESIDUAL, SLOPE

RNG = np.random.default_rng


@table
def test_projection_is_the_dense_one_in_normal_form(shape, dtype):
    r, tolerance = everything(shape, dtype)
    x, p = r["x"], r["projected"]
    close(dense_tangent(x, p), reference.projection(x, r["d"]), tolerance, 20)
    for key in ("u", "v"):
        close(reference.transposed(x[key]) @ p[key], 0, tolerance, 10)
        close(r["twice"][key], p[key], tolerance, 10)
    close(r["twice"]["s"], p["s"], tolerance, 10)


@table
def test_metric_is_that_of_the_dense_matrices(shape, dtype):
    r, tolerance = everything(shape, dtype)
    d, e = (dense_tangent(r["x"], r[key]) for key in ("d", "e"))
    close(r["inner"], np.sum(d * e, (-2, -1)), tolerance, 200)
    close(r["square"], np.sum(d * d, (-2, -1)), tolerance, 200)
    for side in r["adjoint"]:
        close(side, r["inner"], tolerance, 200)


@table
def test_gradient_is_the_metric_dual_of_the_differential(shape, dtype):
    r, tolerance = everything(shape, dtype)
    x, g = r["x"], np.float64(r["g"])
    gradient = dense_tangent(x, r["gradient"])
    close(gradient, reference.dense_projection(dense(x), g, shape[-1]), tolerance, 20)
    for key in ("u", "v"):  # horizontal
        close(reference.transposed(x[key]) @ r["gradient"][key], 0, tolerance, 10)
    # By central differences of f at W ± hZ.
    w, z, a, h = dense(x), dense_tangent(x, r["e"]), r["a"], 1e-6
    f = [np.sum(np.sin(a * (w + t * z)) + a * (w + t * z), (-2, -1)) for t in (h, -h)]
    rounding = 1e-7 if dtype == "float64" else 1e-4
    close(np.sum(gradient * z, (-2, -1)), (f[0] - f[1]) / (2 * h), rounding)


@table
@both
def test_retraction_reaches_the_right_matrix(name, shape, dtype):
    r, tolerance = everything(shape, dtype)
    y, residual = r[name], max(RESIDUAL, tolerance)
    expected = getattr(reference, f"retract_{name}")(r["x"], r["step"])
    close(dense(y), expected, tolerance, 10)
    assert (reference.residual(y) < residual).all()
    for key in reference.PARTS:
        assert y[key].dtype == dtype and y[key].shape == r["x"][key].shape
        np.testing.assert_array_equal(r[f"{name} still"][key], r["x"][key])


@table
def test_orthographic_moves_by_the_tangent(shape, dtype):
    r, tolerance = everything(shape, dtype)
    z = dense_tangent(r["x"], r["step"])
    moved = dense(r["orthographic"]) - dense(r["x"])
    assert reference.orthographic_error(r["x"], z, moved) < tolerance * 20


@table
def test_transport_is_the_dense_projection(shape, dtype):
    r, tolerance = everything(shape, dtype)
    x, y, carried = r["x"], r["orthographic"], r["carried"]
    z = dense_tangent(x, r["d"])
    expected = reference.dense_projection(dense(y), z, shape[-1])
    close(dense_tangent(y, carried), expected, tolerance, 20)
    for key in reference.PARTS:
        close(r["stayed"][key], r["projected"][key], tolerance, 10)
        total = 2 * carried[key] + r["e carried"][key]
        close(r["sum carried"][key], total, tolerance, 20)
    for key in ("u", "v"):
        close(reference.transposed(y[key]) @ carried[key], 0, tolerance, 20)
    assert (np.linalg.norm(expected) <= np.linalg.norm(z)).all()


@both
def test_order_of_the_retraction(name):
    x = reference.draw(RNG(0), ONE)
    v = reference.tangent(RNG(1), x)
    v = scaled(1 / np.linalg.norm(dense_tangent(x, v)), v)
    steps = np.geomspace(3e-3, 0.1, 6)
    with precision("float64"):
        many = stack(*(scaled(t, v) for t in (*steps, *-steps)))
        y = dense(RETRACT[name](spread(x), many))
    forward, backward = y[:6], y[6:]

    def slope(errors):
        norms = np.linalg.norm(errors, axis=(-2, -1))
        return np.polyfit(np.log(steps), np.log(norms), 1)[0]

    line = steps[:, None, None] * dense_tangent(x, v)
    assert abs(slope(forward - dense(x) - line) - 2) < SLOPE
    assert abs(slope(backward - dense(x) + line) - 2) < SLOPE
    assert abs(slope(forward - reference.geodesic(x, v, steps)) - 3) < SLOPE


@both
def test_no_operation_depends_on_the_representation(name):
    x, d, e = draw(ONE)
    rng, g = RNG(3), RNG(4).normal(size=(9, 7))
    q, r, p = (np.linalg.qr(rng.normal(size=(k, k)))[0] for k in (3, 3, 9))

    def rotated(v):  # the same tangent at (UQ, QᵀSR, VR), and one rotated by P
        other = {"u": v["u"] @ r, "s": q.T @ v["s"] @ r, "v": v["v"] @ q}
        return stack(*[v, other, v | {"u": p @ v["u"]}] * 4)

    other = {"u": x["u"] @ q, "s": q.T @ x["s"] @ r, "v": x["v"] @ r}
    xs, ds, es = (
        stack(*[x, other, x | {"u": p @ x["u"]}] * 4),
        scaled(0.2, rotated(d)),
        rotated(e),
    )
    with precision("float64"):
        y = RETRACT[name](xs, ds)
        gradient = GRADIENT(xs, pair(xs, np.stack([g, g, p @ g] * 4)))
        carried = TRANSPORT(xs, y, es)
    for out in (dense(y), dense_tangent(xs, gradient), dense_tangent(y, carried)):
        close(out[1], out[0], FLOAT64, 20)
        close(out[2], p @ out[0], FLOAT64, 20)


def test_columns_keep_their_order():
    """Singular values that are equal, or cross: LAPACK alone would swap columns."""
    x = spread(reference.draw(RNG(0), ONE))
    x["s"] = np.stack([np.eye(3), np.diag([1, 1.001, -1.002])] * 6)
    v = scaled(1e-3, reference.tangent(RNG(1), x))
    raw = np.linalg.svd(dense(x) + dense_tangent(x, v))[0][..., :3]
    assert np.abs(raw - x["u"]).max() > 0.1
    with precision("float64"):
        y = RETRACT["truncation"](x, v)
    for key in reference.PARTS:
        close(y[key], x[key], 1e-2)


@pytest.mark.parametrize(("shape", "rank"), [(ONE, 3), (WIDE, 1)])
def test_truncation_from_the_zero_matrix(shape, rank):
    x = reference.draw(RNG(0), shape)
    x = x | {"s": 0 * x["s"]}
    v = reference.tangent(RNG(1), x)
    if rank == 1:  # the other columns are free
        v["u"][:], v["s"][:], v["v"][:, 1:] = 0, 0, 0
    with precision("float64"):
        y = RETRACT["truncation"](x, v)
        assert reference.residual(y) < FLOAT64
    z = dense_tangent(x, v)
    close(dense(y), reference.best(z, shape[-1]), FLOAT64, 20)
    energy = np.linalg.norm(y["s"]) ** 2 / np.linalg.norm(z) ** 2
    # Not a retraction: rank 2r is truncated to r.
    assert 0.5 < energy < 0.95 if rank == 3 else energy == pytest.approx(1)


@both
def test_a_zero_step_at_the_zero_matrix_is_exact(name):
    x = reference.draw(RNG(0), WIDE) | {"s": np.zeros((3, 3))}
    with precision("float64"):
        y = RETRACT[name](x, scaled(0.0, x))
    for key in reference.PARTS:
        np.testing.assert_array_equal(y[key], x[key])


def test_orthographic_in_float32_for_steps_of_any_size():
    # S of condition number 2, then 1,000; the last point has drifted.
    sizes = np.array([1e-6, 1e-3, 0.3, 1, 3, 10, 100] * 2 + [1e-3])
    x = spread(reference.draw(RNG(0), (40, 30, 8)), 15)
    x["s"] = np.array(x["s"])
    x["s"][7:14] *= np.geomspace(1, 2e-3, 8)[:, None]
    v = reference.tangent(RNG(1), x) | {"s": np.zeros_like(x["s"])}
    for key, c in (("u", x["s"]), ("v", reference.transposed(x["s"]))):
        v[key] = v[key] @ c  # UₚC⁻¹ of spectral norm 1
        norms = np.linalg.norm(v[key] @ np.linalg.inv(c), 2, (-2, -1), keepdims=True)
        v[key] *= sizes[:, None, None] / norms
    expected = reference.retract_orthographic(x, v)
    x["u"] = np.array(x["u"])
    x["u"][-1] += 1e-3 * RNG(2).normal(size=(40, 8))
    expected[-1] = (dense(x) + dense_tangent(x, v))[-1]
    y = RETRACT["orthographic"](cast(x, "float32"), cast(v, "float32"))
    assert reference.residual(x)[-1] > 1e-3
    assert reference.residual(y).max() < RESIDUAL
    for got, want, size in zip(dense(y), expected, sizes, strict=True):
        close(got, want, FLOAT32, float(np.linalg.norm(want, 2)) * max(size, 1))


def test_a_thousand_float32_steps():
    x = cast(reference.draw(RNG(0), (32, 24, 4)), "float32")
    ds = cast(scaled(1e-3, reference.ambient(RNG(1), spread(x, 1000))), "float32")

    def step(x, d):
        (x,) = ORTHOGRAPHIC.step([x], [d])
        return x, ORTHOGRAPHIC.residual(x)

    y, residuals = jax.jit(lambda x, ds: jax.lax.scan(step, x, ds))(x, ds)
    assert residuals.max() < RESIDUAL
    assert np.linalg.norm(dense(y) - dense(x)) > 0.1


@both
def test_a_batch_is_a_loop_and_vmap(name):
    batch, _ = everything(BATCH, "float64")
    args = batch["x"], batch["step"]
    with precision("float64"):
        rows = [RETRACT[name](*jax.tree.map(lambda a, i=i: a[i], args)) for i in (0, 7)]
        mapped = jax.jit(jax.vmap(BOTH[name].retract))(*args)
    for key in reference.PARTS:
        close(np.stack([row[key] for row in rows]), batch[name][key][[0, 7]], 1e-11)
        close(mapped[key], batch[name][key], 1e-11)


@both
def test_step_of_many_points_is_the_retraction_of_each(name):
    draws = [draw(s, i) for i, s in enumerate([ONE, WIDE, ONE])]
    xs, ds = [x for x, _, _ in draws], [scaled(0.2, d) for _, d, _ in draws]
    with precision("float64"):
        together = jax.jit(BOTH[name].step)(xs, ds)
        each = [RETRACT[name](x, PROJECT(x, d)) for x, d in zip(xs, ds, strict=True)]
    jax.tree.map(lambda a, b: close(a, b, 1e-11), together, each)


def test_derivative_of_the_orthographic_retraction():
    x = reference.draw(RNG(0), ONE)
    v, w = (reference.tangent(RNG(seed), x) for seed in (1, 2))
    h, retract = 1e-6, RETRACT["orthographic"]
    with precision("float64"):
        derivative = jax.jit(lambda v: jax.jvp(lambda v: retract(x, v), (v,), (w,))[1])
        for size in (0.0, 0.2):
            at, towards = scaled(size, v), scaled(h, w)
            ahead, behind = (
                retract(x, {k: at[k] + sign * towards[k] for k in at})
                for sign in (1, -1)
            )
            slope = derivative(at)
            for key in reference.PARTS:
                close(slope[key], (ahead[key] - behind[key]) / (2 * h), 1e-8)


@both
def test_bfloat16_points_are_computed_in_float32(name):
    r, _ = everything(*CASES[-1])
    x, d = (cast(r[key], jnp.bfloat16) for key in ("x", "step"))
    y, expected = (
        RETRACT[name](x, d),
        RETRACT[name](cast(x, "float32"), cast(d, "float32")),
    )
    for key in reference.PARTS:
        assert y[key].dtype == jnp.bfloat16
        np.testing.assert_array_equal(y[key], expected[key].astype(jnp.bfloat16))


def lowered(f, *args):
    return jax.jit(f).lower(*args).as_text()


def test_only_truncation_calls_lapack():
    x, d, _ = (cast(t, "float32") for t in draw((9, 7, 3)))
    f = ORTHOGRAPHIC
    for text in (
        lowered(f.step, [x, x], [d, d]),
        lowered(f.transport, x, x, d),
        lowered(f.riemannian_gradient, x, d),
        lowered(f.project, x, d),
        lowered(f.inner, x, d, d),
    ):
        assert "custom_call" not in text and "HIGHEST" in text
    calls = [
        lowered(TRUNCATION.step, [x] * k, [d] * k).count("custom_call @")
        for k in (1, 5)
    ]
    assert calls[0] == calls[1] > 0  # one sequence for all points of one shape


def test_random_points():
    manifold = FixedRank()
    x = jax.jit(lambda key: manifold.random_point(key, ONE))(jax.random.key(0))
    assert manifold.is_point(x) and not manifold.is_point(x["u"])
    assert reference.residual(x) < RESIDUAL
    sigma = np.linalg.svd(np.float64(x["s"]))[1]
    close(sigma, np.broadcast_to(np.linspace(2, 1, 3), sigma.shape), FLOAT32)
    many = jax.eval_shape(
        lambda key: manifold.random_point(key, (2, 3, *ONE), jnp.bfloat16),
        jax.random.key(0),
    )
    for tree in (
        many,
        jax.eval_shape(manifold.random_tangent, jax.random.key(1), many),
    ):
        sizes = {key: a.shape for key, a in tree.items()}
        assert sizes == {"u": (2, 3, 9, 3), "s": (2, 3, 3, 3), "v": (2, 3, 7, 3)}
        assert {a.dtype for a in tree.values()} == {jnp.dtype(jnp.bfloat16)}
    assert hash(manifold) == hash(FixedRank("truncation")) != hash(ORTHOGRAPHIC)


def test_residual_is_the_larger_of_the_two_sides():
    x = spread(reference.draw(RNG(0), ONE), 3)
    for i, key in enumerate(("u", "v")):
        x[key] = x[key] * np.where(np.arange(3) == i, 1.1, 1)[:, None, None]
    close(ORTHOGRAPHIC.residual(cast(x, "float32")), [0.21, 0.21, 0], FLOAT32)


SIZES = {"u": (2, 9, 3), "s": (2, 3, 3), "v": (2, 7, 3)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": (2, 2, 3)}, r"u needs \(2, rows ≥ 3, 3\), got \(2, 2, 3\)"),
        ({"v": (2, 7, 4)}, r"v needs \(2, rows ≥ 3, 3\), got \(2, 7, 4\)"),
        ({"v": (7, 3)}, r"v needs .* got \(7, 3\)"),
        ({"u": (9,)}, r"u needs .* got \(9,\)"),
        ({"s": (2, 2, 3)}, r"s needs \(2, 3, 3\), got \(2, 2, 3\)"),
        ({"u": (9, 3), "v": (2, 1, 3)}, r"u needs .*; v needs .*lower the rank"),
    ],
)
def test_impossible_shapes(change, message):
    ORTHOGRAPHIC.check_shape(SIZES)
    with pytest.raises(ml.InputError, match=message):
        ORTHOGRAPHIC.check_shape(SIZES | change)


def test_bad_input():
    with pytest.raises(ml.InputError, match="Did you mean truncation"):
        FixedRank("truncaton")  # pyright: ignore
    with pytest.raises(ml.InputError, match="rows ≥ 5"):
        FixedRank().random_point(jax.random.key(0), (8, 4, 5))
