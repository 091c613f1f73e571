"""The baselines against float64 NumPy, and Optax's contract for them."""

import functools
import importlib
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

import manifold_lora as ml
from manifold_lora import NNX_LORA, FactorSpec, lora_plus, scaled_gd
from tests.optimizers.numpy_reference import (
    STEPS,
    TRAJECTORY,
    adam,
    distance,
    least_squares,
    sgd,
    trained,
    transposed,
)
from tests.tolerances import FLOAT32

# The name of the module is also that of the function.
MODULE = importlib.import_module("manifold_lora.optimizers.scaled_gd")
PRECONDITIONED = MODULE._preconditioned
RATE = 0.05
OURS = FactorSpec()


def reference_trajectory(inner, damping=None, ratio=1.0, decay=0.0):
    """One step after another with NumPy's inverse; no damping: no preconditioner."""
    a, b, w = least_squares()
    move_a, move_b = inner(RATE), inner(RATE * ratio)
    points = []
    for k in range(1, STEPS + 1):
        error = b @ transposed(a) - w
        g_a, g_b = transposed(error) @ b, error @ a
        if damping is not None:
            eye = damping * np.eye(a.shape[-1])
            g_a = g_a @ np.linalg.inv(transposed(b) @ b + eye)
            g_b = g_b @ np.linalg.inv(transposed(a) @ a + eye)
        a = a + move_a(g_a, k) - RATE * decay * a
        b = b + move_b(g_b, k) - RATE * ratio * decay * b
        points.append({"a": a, "b": b})
    return points


def drift(tx, **expected):
    with jax.enable_x64(True):
        points = trained(tx)
    return distance(points, reference_trajectory(**expected))


def test_scaled_gd_trajectory():
    tx = scaled_gd(RATE, OURS, weight_decay=0.1)
    assert drift(tx, inner=adam, damping=1e-2, decay=0.1) < TRAJECTORY


def test_scaled_gd_with_another_optimiser_and_damping():
    tx = scaled_gd(RATE, OURS, damping=0.5, inner=optax.sgd)
    assert drift(tx, inner=sgd, damping=0.5) < TRAJECTORY


@pytest.mark.parametrize("rate", [RATE, optax.constant_schedule(RATE)], ids=type)
def test_lora_plus_trajectory(rate):
    tx = lora_plus(rate, OURS, ratio=4.0, weight_decay=0.1)
    assert drift(tx, inner=adam, ratio=4.0, decay=0.1) < TRAJECTORY


def own_gram(updates, params, spec, damping):
    swapped = {"a": params["b"], "b": params["a"]}
    return PRECONDITIONED(updates, swapped, spec, damping)


def undamped(updates, params, spec, damping):
    return PRECONDITIONED(updates, params, spec, 0 * damping)


@pytest.mark.parametrize("mutant", [own_gram, undamped])
def test_trajectory_detects_a_mutation(monkeypatch, mutant):
    monkeypatch.setattr(MODULE, "_preconditioned", mutant)
    assert drift(scaled_gd(RATE, OURS), inner=adam, damping=1e-2) > 1e-5


def test_trajectory_detects_preconditioned_moments():
    """Adam before the preconditioner, in the order of other optimisers."""

    def update(updates, state, params=None):
        return PRECONDITIONED(updates, params, OURS, 1e-2), state

    late = optax.GradientTransformation(lambda params: (), update)
    tx = optax.chain(optax.adam(RATE), late)
    assert drift(tx, inner=adam, damping=1e-2) > 1e-3


def test_trajectory_detects_the_ratio_on_the_other_factor():
    tx = lora_plus(RATE, FactorSpec("b", "a"), ratio=4.0)
    assert drift(tx, inner=adam, ratio=4.0) > 1e-2


def test_the_direction_does_not_depend_on_how_the_product_is_split():
    """Without damping to speak of, ΔW moves the same from (B T, A T⁻ᵀ)."""
    t = np.array([[2.0, 0.5, 0], [0, 1.0, 0.3], [0, 0, 0.25]])
    with jax.enable_x64(True):
        a, b, w = map(jnp.asarray, least_squares())
        tx = scaled_gd(1e-2, OURS, damping=1e-13, inner=optax.sgd)

        @jax.jit
        def product(a, b):
            p: Any = {"a": a, "b": b}
            g = jax.grad(lambda p: jnp.sum((p["b"] @ p["a"].mT - w) ** 2))(p)
            p = optax.apply_updates(p, tx.update(g, tx.init(p), p)[0])
            return p["b"] @ p["a"].mT

        split = product(a, b), product(a @ np.linalg.inv(t).T, b @ t)
        moved = np.max(np.abs(split[0] - b @ a.mT))
    assert moved > 1e-3
    np.testing.assert_allclose(*split, rtol=0, atol=TRAJECTORY)


# Optax's contract, on a tree of nnx.LoRA's orientation.
MAKERS = {
    "scaled_gd": scaled_gd,
    "lora_plus": functools.partial(lora_plus, ratio=2.0),
}
each = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
equal = chex.assert_trees_all_equal
close = functools.partial(chex.assert_trees_all_close, rtol=0, atol=FLOAT32)


@functools.cache
def problem(dtype="float32", layers=2):
    rng = np.random.default_rng(0)
    shapes = {"lora_a": (layers, 6, 2), "lora_b": (layers, 2, 4), "norm": (3,)}

    def draw():
        return {k: jnp.asarray(rng.normal(size=s), dtype) for k, s in shapes.items()}

    return draw(), [draw(), draw()]


def run(tx, params=None, gradients=None):
    """The parameters after every step, op by op."""
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
def plain(make):
    return run(make(RATE, NNX_LORA))


@each
def test_jit_traces_once_and_takes_unknown_arguments(make):
    params, gradients = problem()
    tx = make(RATE, NNX_LORA)
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(1)
    def step(g, state, params):
        updates, state = tx.update(g, state, params, an_unknown_argument=1)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for g, expected in zip(gradients, plain(make), strict=True):
        params, state = step(g, state, params)
        close(params, expected)


@each
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_types_are_preserved_under_scan(make, dtype):
    with jax.enable_x64(dtype == "float64"):
        params, _ = problem(dtype)
        tx = make(RATE, NNX_LORA)

        def step(carry, _):
            params, state = carry
            updates, state = tx.update(params, state, params)
            chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
            return (optax.apply_updates(params, updates), state), None

        carry = params, jax.eval_shape(tx.init, params)
        after = jax.eval_shape(lambda c: jax.lax.scan(step, c, length=2)[0], carry)
        chex.assert_trees_all_equal_shapes_and_dtypes(after, carry)


def test_scaled_gd_of_bfloat16_is_computed_in_float32():
    params, (g, _) = problem("bfloat16")
    tx = scaled_gd(1.0, NNX_LORA, inner=optax.sgd)
    updates, _ = jax.jit(tx.update)(g, tx.init(params), params)
    b, g_a = (np.asarray(x, np.float64) for x in (params["lora_b"], g["lora_a"]))
    gram = b @ b.swapaxes(-1, -2) + 1e-2 * np.eye(2)
    expected = -g_a @ np.linalg.inv(gram)
    scale = np.max(np.abs(expected))
    np.testing.assert_allclose(np.float64(updates["lora_a"]), expected, rtol=0,
                               atol=4e-3 * scale)  # fmt: skip


@each
def test_wrapped_by_optax(make):
    params, gradients = problem()
    halves = [optax.tree.scale(c, g) for g in gradients for c in (0.5, 1.5)]
    steps = optax.MultiSteps(make(RATE, NNX_LORA), 2).gradient_transformation()
    close(run(steps, gradients=halves)[1::2], plain(make))

    injected = optax.inject_hyperparams(make)(learning_rate=RATE, pairs=NNX_LORA)
    state: Any = injected.init(params)
    assert "learning_rate" in state.hyperparams
    close(run(injected), plain(make))

    bad = jax.tree.map(lambda x: x.at[0].set(jnp.nan), gradients[0])
    finite = optax.apply_if_finite(make(RATE, NNX_LORA), 5)
    equal(run(finite, gradients=[bad, *gradients]), [params, *plain(make)])

    labels = {"adapter": "ours", "head": "sgd"}
    ours: Any = {"ours": make(RATE, NNX_LORA), "sgd": optax.sgd(0.25)}
    points = run(
        optax.partition(ours, labels),
        {"adapter": params, "head": jnp.ones(3)},
        [{"adapter": g, "head": jnp.ones(3)} for g in gradients],
    )
    equal([p["adapter"] for p in points], plain(make))
    equal([p["head"] for p in points], [0.75 * np.ones(3), 0.5 * np.ones(3)])


@each
def test_map_params(make):
    tx = optax.chain(optax.clip_by_global_norm(1.0), make(RATE, NNX_LORA))
    state = tx.init(problem()[0])
    mapped = optax.tree.map_params(tx, lambda x: x + 1, state)
    assert any(x.ndim == 3 for x in jax.tree.leaves(state))
    equal(mapped, jax.tree.map(lambda x: x + (x.ndim > 0), state))


@each
def test_other_leaves_and_schedules(make):
    params, gradients = problem()
    norms = [{"norm": g["norm"]} for g in gradients]
    alone = run(optax.adam(RATE), {"norm": params["norm"]}, norms)
    equal([p["norm"] for p in plain(make)], [p["norm"] for p in alone])

    def once(count):
        return jnp.where(count == 0, RATE, 0.0)

    first = plain(make)[0]
    close(run(make(once, NNX_LORA)), [first, first])


def test_lora_plus_at_ratio_1_is_adamw_bit_for_bit():
    for decay in (0.0, 0.1):
        tx = lora_plus(RATE, NNX_LORA, ratio=1.0, weight_decay=decay)
        equal(run(tx), run(optax.adamw(RATE, weight_decay=decay)))


def test_extra_arguments_reach_the_inner_optimiser():
    def update(updates, state, params=None, *, factor=1.0, **extra_args):
        del params, extra_args
        return optax.tree.scale(factor, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda params: (), update)
    params, (g, _) = problem()
    for make in MAKERS.values():
        tx = make(RATE, NNX_LORA, inner=lambda _: inner)
        with jax.disable_jit():
            updates, _ = tx.update(g, tx.init(params), params, factor=0.0, other=1)
        equal(updates, jax.tree.map(jnp.zeros_like, params))


@each
def test_bad_input(make):
    params, (g, _) = problem()
    tx = make(RATE, NNX_LORA)
    state = tx.init(params)
    with pytest.raises(ValueError, match="needs the parameters: call update"):
        tx.update(g, state)
    with pytest.raises(ml.InputError, match="lora_a has no partner"):
        tx.init({"lora_a": params["lora_a"]})
    by_factor = optax.partition(
        {"ours": tx, "sgd": optax.sgd(0.1)},
        {"lora_a": "ours", "lora_b": "sgd", "norm": "sgd"},
    )
    with pytest.raises(ml.InputError, match="partition by module"):
        by_factor.init(params)
    option = {"damping": 0.0} if make is scaled_gd else {"ratio": -1}
    with pytest.raises(ml.InputError, match="above 0"):
        make(RATE, NNX_LORA, **option)


def test_sharded_layers():
    params, (g, _) = problem(layers=8)
    tx = scaled_gd(RATE, NNX_LORA)
    expected = jax.jit(tx.update)(g, tx.init(params), params)[0]
    mesh = jax.make_mesh((8,), ("layers",), axis_types=(AxisType.Explicit,))

    def shard(x):
        spec = jax.P("layers") if x.ndim == 3 else jax.P()
        return jax.device_put(x, jax.NamedSharding(mesh, spec))

    with jax.set_mesh(mesh):
        params, g = jax.tree.map(shard, (params, g))
        state = jax.tree.map(shard, tx.init(params))
        update = jax.jit(tx.update).lower(g, state, params).compile()
        updates, _ = update(g, state, params)
    for x, u in zip(jax.tree.leaves(params), jax.tree.leaves(updates), strict=True):
        assert x.sharding.is_equivalent_to(u.sharding, x.ndim)
    program = str(update.as_text())
    assert "all-" not in program and "collective" not in program
    close(jax.device_get(updates), expected)
