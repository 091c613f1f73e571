"""Manifold-LoRA's algorithm 1 against float64 NumPy, in each of its readings."""

import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import manifold_lora as ml
from manifold_lora.optimizers.landing_adamw import landing_adamw
from tests.manifolds import reference
from tests.optimizers.numpy_reference import (
    STEPS,
    TRAJECTORY,
    adam,
    distance,
    least_squares,
    projected,
    train,
    trained,
    transposed,
)
from tests.tolerances import CONVERGENCE, FLOAT64, RESIDUAL

RATE, DECAY, LOWER, UPPER = 0.02, 0.3, 0.05, 4.0
FREE, STIEFEL, OBLIQUE = ml.Euclidean(), ml.Stiefel(), ml.Oblique()


def schedule(count):
    return 2.0**-5 * (count < STEPS // 2) + 2.0**-7  # exact in every dtype


def pairs():
    """Two pairs of different shapes; the second has a small free factor."""
    a, b, w = least_squares()
    c, d, z = least_squares(12, 7, 2)
    return {"q": {"a": a, "b": b}, "k": {"a": 0.2 * c, "b": d}}, {"q": w, "k": z}


def size(x):
    """The Schatten norm of p = 4096, which is ‖X‖₂ up to 1 in 1000."""
    s = np.linalg.svd(x, compute_uv=False)[..., None]
    top = s[..., :1, :]
    return top * np.sum((s / top) ** 4096, -2, keepdims=True) ** (1 / 4096)


def constraint(x, value, oblique):
    """Value − X sym(Xᵀ value), or column by column."""
    if oblique:
        return value - x * np.sum(x * value, -2, keepdims=True)
    return projected(x, value)


def reference_trajectory(
    a, b, w, *, oblique=False, literal=False, attraction=None, rate=None
):
    """Algorithm 1 for one pair, as `landing_adamw` reads it."""
    move_a, move_b = adam(1.0), adam(1.0)
    points = []
    for k in range(1, STEPS + 1):
        lr = RATE if rate is None else rate(k - 1)
        error = b @ transposed(a) - w
        g_a, g = transposed(error) @ b, constraint(b, error @ a, oblique)
        by_b, by_a = (
            np.clip(n if literal else 1 / n**2, LOWER, UPPER)
            for n in (size(b), size(a))
        )
        d = constraint(b, lr * by_a * move_b(g, k), oblique)
        a = a + lr * by_b * (move_a(g_a, k) - DECAY * a)
        b = b + d
        gram = transposed(b) @ b - np.eye(b.shape[-1])
        gram = gram * np.eye(b.shape[-1]) if oblique else gram
        b = b - (4 * lr * 0.9 if attraction is None else attraction) * b @ gram
        points.append({"a": a, "b": b})
    return points


def trajectory(rate, manifold=STIEFEL, **options):
    with jax.enable_x64(True):
        params, targets = jax.tree.map(jnp.asarray, pairs())
        tx = landing_adamw(
            rate,
            {k: {"a": FREE, "b": manifold} for k in params},
            weight_decay=DECAY,
            lower=LOWER,
            max_step=None,
            **options,
        )

        def loss(p):
            errors = [p[k]["b"] @ p[k]["a"].mT - targets[k] for k in p]
            return sum(jnp.sum(e**2) / 2 for e in errors)

        return train(tx, params, loss)


def error(points, **options):
    params, targets = pairs()
    return max(
        distance(points[k], reference_trajectory(**params[k], w=targets[k], **options))
        for k in points
    )


WEIGHT = {"penalty_weight": 0.9}
READINGS = {
    "default": (RATE, STIEFEL, WEIGHT, {}),
    "literal": (
        RATE,
        OBLIQUE,
        {**WEIGHT, "norm_rule": "literal"},
        {"oblique": True, "literal": True},
    ),
    "attraction": (RATE, STIEFEL, {"attraction": 0.4}, {"attraction": 0.4}),
    "schedule": (schedule, STIEFEL, WEIGHT, {"rate": schedule}),
}


@pytest.mark.parametrize("name", READINGS)
def test_trajectory(name):
    rate, manifold, options, reading = READINGS[name]
    points = trajectory(rate, manifold, **options)
    assert error(points, **reading) < TRAJECTORY
    if name != "default":  # and the readings differ
        assert error(points) > 1e-4


def test_trajectory_detects_factors_scaled_by_themselves(monkeypatch):
    module = sys.modules[landing_adamw.__module__]
    monkeypatch.setattr(module, "_partners", lambda *_: {i: i for i in range(4)})
    assert not error(trajectory(RATE, penalty_weight=0.9)) < 1e-3


def multiples(manifolds, params, **options):
    """What the rate of each free leaf is multiplied by; None for constrained ones."""
    ones = jax.tree.map(jnp.ones_like, params)
    tx = landing_adamw(
        1.0, manifolds, lower=0.01, upper=100.0, inner=optax.sgd, **options
    )
    updates = jax.jit(tx.update)(ones, tx.init(params), params)[0]
    return jax.tree.map(
        lambda m, u: None if m == STIEFEL else -float(u.ravel()[0]), manifolds, updates
    )


def orthonormal(*shape):
    x = np.random.default_rng(0).normal(size=shape)
    return jnp.asarray(reference.each(reference.qr, x), "float32")


def free(*shape):
    return jnp.full(shape, 0.5, "float32")


def test_partners_are_siblings_of_one_rank():
    b = 1.05 * orthonormal(8, 3)
    tree = {
        "pair": {"a": free(5, 3), "b": b},
        "others": {"a": free(5, 3), "b": b, "m": free(3), "head": free(5, 4)},
        "two": {"a": free(5, 3), "b": b, "c": free(4, 3)},
        "ranks": {"a": free(5, 2), "b": b},
        "both": {"a": free(5, 3), "b": b, "c": b},
        "alone": {"a": free(5, 3)},
    }
    manifolds = jax.tree.map(lambda x: STIEFEL if x.shape[0] == 8 else FREE, tree)
    result = multiples({"deep": [manifolds]}, {"deep": [tree]})["deep"][0]
    assert abs(result.pop("pair")["a"] - 1.05**-2) < 1e-3
    assert abs(result["others"].pop("a") - 1.05**-2) < 1e-3
    alone = {
        k: {n: v for n, v in f.items() if v is not None} for k, f in result.items()
    }
    assert alone == {
        "others": {"m": 1, "head": 1},
        "two": {"a": 1, "c": 1},
        "ranks": {"a": 1},
        "both": {"a": 1},
        "alone": {"a": 1},
    }


def test_layers_have_their_own_norms():
    b = orthonormal(2, 8, 3) * jnp.asarray([1.0, 1.04])[:, None, None]
    # The second pair has no norm for each of its layers.
    params = {i: {"a": free(i, 5, 3), "b": b} for i in (2, 1)}
    tx = landing_adamw(
        1.0, {i: {"a": FREE, "b": STIEFEL} for i in params}, inner=optax.sgd
    )
    ones = jax.tree.map(jnp.ones_like, params)
    u = jax.jit(tx.update)(ones, tx.init(params), params)[0]
    factors = [-float(x) for i in (2, 1) for x in u[i]["a"][:, 0, 0]]
    np.testing.assert_allclose(factors, [1, 1.04**-2, 1], atol=1e-3)


class Factors(NamedTuple):
    a: Any
    b: Any


class Module(nnx.Module):
    def __init__(self, a, b):
        self.a, self.b = nnx.Param(a), nnx.Param(b)


def test_pairs_in_other_containers():
    b = 1.05 * orthonormal(8, 3)
    for build, tree in (
        (Factors, Factors),
        (lambda a, b: nnx.state(Module(a, b)), lambda a, b: nnx.State(dict(a=a, b=b))),
    ):
        values = multiples(tree(a=FREE, b=STIEFEL), build(a=free(5, 3), b=b))
        assert abs(jax.tree.leaves(values)[0] - 1.05**-2) < 1e-3


def test_bounds_and_a_partner_at_zero():
    b = orthonormal(8, 3)
    zero = {"a": jnp.zeros((5, 3)), "b": b}
    rules: Any = (("inverse_square", 3.0), ("literal", 0.25))
    for rule, multiple in rules:
        tx = landing_adamw(
            0.1,
            {"a": FREE, "b": STIEFEL},
            inner=optax.sgd,
            norm_rule=rule,
            lower=0.25,
            upper=3.0,
            penalty_weight=1e-9,
        )
        g = {"a": jnp.ones((5, 3)), "b": 1e-3 * jnp.ones((8, 3))}
        u = jax.jit(tx.update)(g, tx.init(zero), zero)[0]
        v = -0.1 * multiple * projected(np.float64(b), np.float64(g["b"]))
        np.testing.assert_allclose(u["b"], v, atol=RESIDUAL)
        assert abs(u["a"][0, 0] + 0.1) < 1e-4


def test_decay_acts_on_free_leaves_only():
    with jax.enable_x64(True):
        a, b, _ = (jnp.asarray(x) for x in least_squares())
        params = {"a": a, "b": b, "bias": jnp.ones(4)}
        manifolds = {"a": FREE, "b": STIEFEL, "bias": FREE}
        tx = landing_adamw(0.1, manifolds, weight_decay=0.3)
        zero = jax.tree.map(jnp.zeros_like, params)
        u = jax.jit(tx.update)(zero, tx.init(params), params)[0]
    np.testing.assert_allclose(u["bias"], -0.03, atol=FLOAT64)
    # ‖B‖₂⁻² = 1
    np.testing.assert_allclose(u["a"], -0.03 * least_squares()[0], rtol=1e-3)
    assert np.max(np.abs(u["b"])) < FLOAT64


def test_the_penalty_as_printed_diverges():
    x = reference.qr(np.random.default_rng(1).normal(size=(8, 3))) * 1.001
    y = x
    for _ in range(8):  # the gradient of ‖BᵀB − I‖² and μ = 0.9, unscaled
        y = y - 0.9 * 4 * y @ (y.T @ y - np.eye(3))
    assert not np.max(np.abs(y)) < 1e3
    with pytest.raises(ml.InputError, match="landing_adamw needs an attraction"):
        landing_adamw(0.1, STIEFEL, attraction=1.0)
    # Multiplied by any learning rate it lands: it never overshoots.
    for rate in (0.1, 10.0):
        tx = landing_adamw(rate, STIEFEL, inner=lambda _: optax.set_to_zero())
        points = train(tx, jnp.asarray(x, "float32"), lambda x: jnp.sum(x), 30)
        assert STIEFEL.residual(points[-1]) < RESIDUAL


def test_bad_options():
    cases: Any = (
        ({"norm_rule": "square"}, "Did you mean inverse_square"),
        ({"lower": 2.0, "upper": 0.5}, "0 < lower ≤ upper"),
        ({"lower": 0.0}, "0 < lower ≤ upper"),
        ({"penalty_weight": 0}, "penalty_weight above 0"),
        ({"attraction": 0}, "attraction between 0 and 1"),
        ({"max_step": -1}, "max_step above 0"),
    )
    for options, message in cases:
        with pytest.raises(ml.InputError, match=message):
            landing_adamw(1e-3, STIEFEL, **options)
    with pytest.raises(ml.InputError, match="never leaves zero"):
        tx = landing_adamw(1e-3, {"a": FREE, "b": STIEFEL})
        tx.init({"a": orthonormal(5, 3), "b": jnp.zeros((8, 3))})


def test_landing_adamw_finds_the_best_low_rank_approximation():
    rate = optax.cosine_decay_schedule(0.1, 400)
    manifolds = {"a": FREE, "b": STIEFEL}
    points = trained(landing_adamw(rate, manifolds), dtype="float32", steps=400)
    a, b, w = points["a"][-1], points["b"][-1], least_squares()[2]
    loss = np.sum((b @ transposed(a) - w) ** 2)
    tail = np.linalg.svd(w, compute_uv=False)[:, 3:]
    assert abs(loss / np.sum(tail**2) - 1) < CONVERGENCE
