"""LoRAM's trajectories against dense float64 NumPy, and the effect of its options."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import manifold_lora as ml
from tests.cases import slow_but
from tests.manifolds import reference
from tests.optimizers.numpy_reference import STEPS, TRAJECTORY
from tests.tolerances import CONVERGENCE, FLOAT64

RATE, ALPHA = 0.05, 0.5
BOUNDED, FIXED = ml.BoundedRank(ALPHA), ml.FixedRank("orthographic")
ROWS, COLUMNS, RANK = 9, 7, 3


def start(seed=0):
    """An initial point of either manifold, as (U, S, V), and a target."""
    rng = np.random.default_rng(seed)
    u, v = (reference.qr(rng.normal(size=(n, RANK))) for n in (ROWS, COLUMNS))
    s = 3 * np.eye(RANK) + rng.normal(size=(RANK, RANK)) / 3
    return u, s, v, rng.normal(size=(ROWS, COLUMNS))


def root(n):
    """(I + N)^(−½)."""
    values, q = np.linalg.eigh(np.eye(len(n)) + n)
    return q / np.sqrt(values) @ q.T


class Adam:
    """m and v of one block, without bias correction."""

    def __init__(self, mean):
        self.m: Any = 0.0
        self.v, self.mean = 0.0, mean

    def __call__(self, g):
        square = g**2
        if self.mean == "row" and g.shape[0] > g.shape[1]:
            square = square.mean(1, keepdims=True)
        elif self.mean != "coordinate":
            square = square.mean(keepdims=True)
        self.m = 0.9 * self.m + 0.1 * g
        self.v = 0.999 * self.v + 0.001 * square
        return -RATE * self.m / (np.sqrt(self.v) + 1e-8)


def outside(basis, x):
    return x - basis @ (basis.T @ x)


def bounded_reference(second_moment, nuclear_decay=0.0, rotation=None):
    """Algorithm 5: W = A Vᵀ, its retraction and transport as dense matrices."""
    u, s, v, w = start()
    a = u @ s
    if rotation is not None:
        a, v = a @ rotation, v @ rotation
    adam_k, adam_v = Adam(second_moment), Adam(second_moment)
    points = []
    for _ in range(STEPS):
        gradient = a @ v.T - w
        metric = 2 * ALPHA * np.eye(RANK) + a.T @ a
        k = adam_k(gradient @ v)
        step = adam_v(outside(v, gradient.T @ a) @ np.linalg.inv(metric))
        step = outside(v, step)
        # The rows of W + Ẇ on the new space, in the basis nearest to the old one.
        v_new = (v + step) @ root(step.T @ step)
        a_new = (a @ v.T + k @ v.T + a @ step.T) @ v_new
        dense_w = adam_k.m @ v.T + a @ adam_v.m.T
        dense_p = -(adam_v.m @ v.T + v @ adam_v.m.T)
        metric = 2 * ALPHA * np.eye(RANK) + a_new.T @ a_new
        adam_k.m = dense_w @ v_new
        lifted = dense_w.T @ a_new - 2 * ALPHA * dense_p @ v_new
        adam_v.m = outside(v_new, lifted) @ np.linalg.inv(metric)
        a, v = a_new, v_new
        if nuclear_decay:
            p, sigma, qt = np.linalg.svd(a, full_matrices=False)
            a = p * np.maximum(sigma - nuclear_decay, 0) @ qt
        points.append({"a": a, "v": v})
    return points


def fixed_reference(second_moment):
    """Algorithm 1 with the orthographic retraction, gradients and transport dense."""
    u, s, v, w = start()
    moves = [Adam(second_moment) for _ in range(3)]
    points = []
    for _ in range(STEPS):
        g = u @ s @ v.T - w
        m = u.T @ g @ v
        up, mid, vp = (
            move(x)
            for move, x in zip(
                moves, (g @ v - u @ m, m, g.T @ u - v @ m.T), strict=True
            )
        )
        mid = mid + u.T @ up + vp.T @ v
        up, vp = outside(u, up), outside(v, vp)
        c = s + mid
        inverse = np.linalg.inv(c)
        z = u @ moves[1].m @ v.T + moves[0].m @ v.T + u @ moves[2].m.T
        y_u, y_v = u + up @ inverse, v + vp @ inverse.T
        u, v = reference.polar(y_u), reference.polar(y_v)
        s = u.T @ y_u @ c @ y_v.T @ v
        moves[1].m = u.T @ z @ v
        moves[0].m, moves[2].m = outside(u, z @ v), outside(v, z.T @ u)
        points.append({"u": u, "s": s, "v": v})
    return points


def bounded_gradient(x, w):
    return jax.grad(lambda x: jnp.sum((x["a"] @ x["v"].mT - w) ** 2) / 2)(x)


def fixed_gradient(x, w):
    """The pair G V, UᵀG V, GᵀU."""
    g = x["u"] @ x["s"] @ x["v"].mT - w
    return {"u": g @ x["v"], "s": x["u"].mT @ g @ x["v"], "v": g.mT @ x["u"]}


GRADIENT = {BOUNDED: bounded_gradient, FIXED: fixed_gradient}


def solve(tx, manifold, x, w, steps=STEPS):
    """The points and states of every step, by one scan."""

    def step(carry, _):
        x, state = carry
        updates, state = tx.update(GRADIENT[manifold](x, w), state, x)
        x = optax.apply_updates(x, updates)
        return (x, state), (x, state)

    run = jax.jit(lambda x: jax.lax.scan(step, (x, tx.init(x)), length=steps)[1])
    return jax.tree.map(np.asarray, run(jax.tree.map(jnp.asarray, x)))


def point(manifold, rotation=None):
    u, s, v, _ = start()
    q = np.eye(RANK) if rotation is None else rotation
    if manifold == BOUNDED:
        return {"a": u @ s @ q, "v": v @ q}
    return {"u": u @ q, "s": q.T @ s @ q, "v": v @ q}


def distance(points, expected):
    return max(
        np.max(np.abs(points[k] - np.stack([p[k] for p in expected]))) for k in points
    )


W = start()[-1]
REFERENCES = {BOUNDED: bounded_reference, FIXED: fixed_reference}


@pytest.mark.parametrize("manifold", REFERENCES, ids=str)
@pytest.mark.parametrize("second_moment", ["row", "coordinate", "scalar"])
def test_trajectory(manifold, second_moment):
    with jax.enable_x64(True):
        tx = ml.loram(RATE, manifold, second_moment=second_moment)
        points, _ = solve(tx, manifold, point(manifold), W)
    assert distance(points, REFERENCES[manifold](second_moment)) < TRAJECTORY


@pytest.mark.parametrize("scaled", [False, True])
def test_trajectory_with_nuclear_decay(scaled):
    with jax.enable_x64(True):
        tx = ml.loram(
            optax.constant_schedule(RATE),
            BOUNDED,
            nuclear_decay=0.3 / RATE if scaled else 0.3,
            nuclear_decay_scaled_by_learning_rate=scaled,
        )
        points, _ = solve(tx, BOUNDED, point(BOUNDED), W)
    assert distance(points, bounded_reference("row", 0.3)) < TRAJECTORY
    assert distance(points, bounded_reference("row")) > 1e-2


@pytest.mark.parametrize("manifold", REFERENCES, ids=str)
def test_momentum_is_tangent_and_the_second_moment_positive(manifold):
    with jax.enable_x64(True):
        tx = ml.loram(RATE, manifold, second_moment="coordinate")
        points, states = solve(tx, manifold, point(manifold), W)
        (_, mu), (_, nu) = (
            optax.tree.get_all_with_path(states, name)[0] for name in ("mu", "nu")
        )
    assert min(x.min() for x in jax.tree.leaves(nu)) >= 0
    for k in {"u", "v"} & set(mu):
        assert np.abs(points[k].swapaxes(-1, -2) @ mu[k]).max() < FLOAT64


def dense(x):
    middle = x["a"] if "a" in x else x["u"] @ x["s"]
    return middle @ x["v"].swapaxes(-1, -2)


@pytest.mark.parametrize("manifold", slow_but([BOUNDED], REFERENCES), ids=str)
def test_only_coordinates_depend_on_the_gauge(manifold):
    q = reference.qr(np.random.default_rng(5).normal(size=(RANK, RANK)))
    with jax.enable_x64(True):

        def difference(second_moment):
            tx = ml.loram(RATE, manifold, second_moment=second_moment)
            ways = [solve(tx, manifold, point(manifold, q_), W)[0] for q_ in (None, q)]
            return np.abs(dense(ways[0]) - dense(ways[1])).max()

        assert difference("row") < TRAJECTORY
        assert difference("scalar") < TRAJECTORY
        assert difference("coordinate") > 1e-2


def test_bias_correction_is_adam_at_the_first_step():
    with jax.enable_x64(True):
        x = jax.tree.map(jnp.asarray, point(BOUNDED))
        g = bounded_gradient(x, W)
        steps = {}
        for corrected in (True, False):
            tx = ml.loram(
                1e-6, BOUNDED, second_moment="scalar", bias_correction=corrected
            )
            steps[corrected], _ = jax.jit(tx.update)(g, tx.init(x), x)
    # m̂/√v̂ has mean square 1; without correction it is 0.1/√0.001 times as long.
    size = np.sqrt(np.mean(np.square(steps[True]["a"]))) / 1e-6
    assert abs(size - 1) < 1e-4
    ratio = np.linalg.norm(steps[False]["a"]) / np.linalg.norm(steps[True]["a"])
    assert abs(ratio - 0.1 / np.sqrt(0.001)) < 1e-3


def test_free_leaves_get_adamw_bit_for_bit():
    rng = np.random.default_rng(0)
    x = jax.tree.map(lambda x: jnp.asarray(x, "float32"), point(BOUNDED))
    params = {"point": x, "free": jnp.asarray(rng.normal(size=4), "float32")}
    grads = jax.tree.map(jnp.ones_like, params)
    tx = ml.loram(RATE, {"point": BOUNDED, "free": ml.Euclidean()}, weight_decay=0.1)
    alone = optax.adamw(RATE, weight_decay=0.1)
    with jax.disable_jit():
        updates: Any = tx.update(grads, tx.init(params), params)[0]
        expected, _ = alone.update(
            grads["free"], alone.init(params["free"]), params["free"]
        )
    np.testing.assert_array_equal(updates["free"], expected)


@pytest.mark.parametrize("manifold", REFERENCES, ids=str)
def test_weight_decay_shrinks_the_matrix_alone(manifold):
    with jax.enable_x64(True):
        x = jax.tree.map(jnp.asarray, point(manifold))
        tx = ml.loram(0.1, manifold, weight_decay=0.3)
        zero = jax.tree.map(jnp.zeros_like, x)
        updates, _ = jax.jit(tx.update)(zero, tx.init(x), x)
        after: Any = jax.tree.map(lambda x, u: np.asarray(x + u), x, updates)
    np.testing.assert_allclose(
        dense(after), 0.97 * dense(point(manifold)), atol=FLOAT64
    )


def completion(rank, seed=3, density=0.6):
    """Entries of a matrix of that rank, as a masked least squares problem."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=(30, rank)) @ rng.normal(size=(rank, 24))
    return truth, rng.random(truth.shape) < density


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def complete(tx, manifold, steps, x, truth, mask):
    def step(carry, _):
        x, state = carry
        g = jnp.where(mask, dense(x) - truth, 0)
        if manifold == FIXED:
            grads = {"u": g @ x["v"], "s": x["u"].mT @ g @ x["v"], "v": g.mT @ x["u"]}
        else:
            grads = {"a": g @ x["v"], "v": g.mT @ x["a"]}
        gradient = manifold.riemannian_gradient(x, grads)
        updates, state = tx.update(grads, state, x)
        x: Any = optax.apply_updates(x, updates)
        return (x, state), manifold.norm(x, gradient)

    return jax.lax.scan(step, (x, tx.init(x)), length=steps)


def test_fixed_rank_completes_a_matrix():
    truth, mask = completion(3)
    with jax.enable_x64(True):
        u, sigma, vt = np.linalg.svd(np.where(mask, truth, 0) / mask.mean())
        x = {"u": u[:, :3], "s": np.diag(sigma[:3]), "v": vt[:3].T}
        x = jax.tree.map(jnp.asarray, x)
        tx = ml.riemannian(optax.sgd(1.0, 0.5), FIXED, transport=True)
        (end, _), gradients = complete(tx, FIXED, 400, x, truth, mask)
        assert np.abs(dense(end) - truth).max() < 1e-9
        assert gradients[-1] < 1e-10


def test_bounded_rank_finds_the_true_rank_with_nuclear_decay():
    truth, mask = completion(2, density=0.8)
    with jax.enable_x64(True):
        # Initialised at zero, which is not on the manifold of fixed rank.
        v = reference.qr(np.random.default_rng(0).normal(size=(24, 8)))
        x = {"a": jnp.zeros((30, 8)), "v": jnp.asarray(v)}
        spectra = {}
        for decay in (1.0, 0.0):
            rate = optax.cosine_decay_schedule(0.1, 600)
            tx = ml.loram(
                rate,
                BOUNDED,
                bias_correction=True,
                nuclear_decay=decay,
                nuclear_decay_scaled_by_learning_rate=True,
            )
            (end, _), _ = complete(tx, BOUNDED, 600, x, truth, mask)
            spectra[decay] = np.linalg.svd(dense(end), compute_uv=False)
    true = np.linalg.svd(truth, compute_uv=False)[:2]
    assert np.all(spectra[1.0][2:] < CONVERGENCE)
    np.testing.assert_allclose(spectra[1.0][:2], true, rtol=0.05)
    assert spectra[0.0][2] > 1e-2


def test_bad_input():
    with pytest.raises(ml.InputError, match="row"):
        ml.loram(0.1, BOUNDED, second_moment="rows")  # pyright: ignore[reportArgumentType]
    tx = ml.loram(0.1, ml.Stiefel(), nuclear_decay=0.1)
    with pytest.raises(
        ml.InputError, match="nuclear_decay needs a point on BoundedRank"
    ):
        tx.init(jnp.eye(4, 2))
