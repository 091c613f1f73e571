"""Optax's contract for a transformation, as one table over every optimiser.

Values are compared op by op, without jit: nothing is fused, so that two optimisers
that are the same agree to the last bit. Types and shapes are compared on the trace.
"""

import functools
import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

import manifold_lora as ml
from tests.cases import slow_but
from tests.optimizers.table import (
    OPTIMIZERS,
    RATE,
    assert_close,
    each,
    each_on_manifolds,
    free_leaves,
    halves,
    over,
    plain,
    run,
    types,
)
from tests.tolerances import FLOAT32, RESIDUAL

HYPERPARAMETERS = 5e-5  # 1 − β₂ from a float32 β₂


@pytest.mark.smoke
@each
def test_jit_traces_once_and_takes_unknown_arguments(row):
    params, gradients = row.problem()
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(1)
    def step(g, state, params):
        updates, state = row.tx.update(g, state, params, an_unknown_argument=1)
        return optax.apply_updates(params, updates), state

    state = row.tx.init(params)
    for g, expected in zip(gradients, plain(row), strict=True):
        params, state = step(g, state, params)
        assert_close(params, expected)
        assert (row.manifold.residual(params["b"]) < row.within).all()


def test_extra_arguments_reach_the_inner_optimiser():
    def update(updates, state, params=None, *, factor=1.0, **extra_args):
        del params, extra_args
        return optax.tree.scale(factor, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda params: (), update)
    row = OPTIMIZERS["momentum-qr"]
    params, (g, _) = row.problem()
    for tx in (
        ml.riemannian(inner, row.manifolds),
        ml.stiefel_lora(RATE, row.manifolds, inner=lambda _: inner),
    ):
        with jax.disable_jit():
            updates, _ = tx.update(g, tx.init(params), params, factor=0.0, other=1)
        assert_close(updates, jax.tree.map(jnp.zeros_like, params), RESIDUAL)


@each
def test_update_without_parameters_raises(row):
    params, gradients = row.problem()
    state = row.tx.init(params)
    with pytest.raises(ValueError, match="needs the parameters"):
        row.tx.update(gradients[0], state)


@each
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_types_are_preserved_under_scan(row, dtype):
    with jax.enable_x64(dtype == "float64"):
        params = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, dtype), row.problem()[0]
        )
        state = jax.eval_shape(row.tx.init, params)
        updates, after = jax.eval_shape(row.tx.update, params, state, params)
        assert types(updates) == types(params)
        assert types(after) == types(state)

        def step(carry, _):
            params, state = carry
            updates, state = row.tx.update(params, state, params)
            return (optax.apply_updates(params, updates), state), None

        carry = jax.eval_shape(lambda c: jax.lax.scan(step, c, length=2)[0],
                               (params, state))  # fmt: skip
        assert types(carry) == types((params, state))


@each_on_manifolds
def test_euclidean_everywhere_is_the_inner_optimiser_bit_for_bit(row):
    flat, inner = row.make(RATE, ml.Euclidean()), row.free(RATE)
    params, gradients = row.problem()
    chex.assert_trees_all_equal(
        run(flat, params, gradients), run(inner, params, gradients)
    )
    g = gradients[0]
    with jax.disable_jit():
        updates, expected = (
            tx.update(g, tx.init(params), params)[0] for tx in (flat, inner)
        )
    chex.assert_trees_all_equal(updates, expected)


@each_on_manifolds
def test_free_leaves_get_the_inner_optimiser_bit_for_bit(row):
    params, gradients = row.problem()
    alone = run(
        row.free(RATE), free_leaves(params), [free_leaves(g) for g in gradients]
    )
    chex.assert_trees_all_equal([free_leaves(p) for p in plain(row)], alone)


@each
def test_multi_steps_outside_is_the_mean_gradient(row):
    tx = optax.MultiSteps(row.tx, 2).gradient_transformation()
    points = run(tx, row.problem()[0], halves(row.problem()[1]))
    chex.assert_trees_all_equal(points[0], row.problem()[0])
    chex.assert_trees_all_equal(points[2], points[1])
    assert_close(points[1::2], plain(row))


def accumulated(rate):
    return optax.MultiSteps(optax.adam(rate), 2).gradient_transformation()


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("adam", lambda manifolds: ml.riemannian(accumulated(RATE), manifolds)),
        ("stiefel_lora", functools.partial(ml.stiefel_lora, RATE, inner=accumulated)),
    ],
)
def test_multi_steps_inside_is_the_mean_gradient(name, make):
    row = OPTIMIZERS[name]
    points = run(make(row.manifolds), row.problem()[0], halves(row.problem()[1]))
    assert_close(points[1::2], plain(row))


@each
def test_inject_hyperparams(row):
    make = optax.inject_hyperparams(row.make, static_args=("manifolds",))
    tx = make(learning_rate=RATE, manifolds=row.of_shapes)
    assert_close(run(tx, *row.problem()), plain(row), HYPERPARAMETERS)
    state: Any = tx.init(row.problem()[0])
    assert abs(state.hyperparams["learning_rate"] - RATE) < FLOAT32


@each
def test_apply_if_finite_skips_bad_gradients(row):
    params, gradients = row.problem()
    bad = jax.tree.map(lambda x: x.at[0].set(jnp.nan), gradients[0])
    points = run(optax.apply_if_finite(row.tx, 5), params, [bad, *gradients])
    chex.assert_trees_all_equal(points[0], params)
    chex.assert_trees_all_equal(points[1:], plain(row))


@each
def test_partition_with_another_optimiser(row):
    params, gradients = row.problem()
    head = jnp.arange(3.0)
    manifolds = {"adapter": row.manifolds, "head": ml.Euclidean()}
    tx = optax.partition(
        {"ours": row.make(RATE, manifolds), "sgd": optax.sgd(0.25)},
        {"adapter": "ours", "head": "sgd"},
    )
    points = run(
        tx,
        {"adapter": params, "head": head},
        [{"adapter": g, "head": head} for g in gradients],
    )
    chex.assert_trees_all_equal([p["adapter"] for p in points], plain(row))
    chex.assert_trees_all_equal([p["head"] for p in points], [0.75 * head, 0.5 * head])


@each
@pytest.mark.parametrize("of_parameters", [False, True], ids=["tree", "function"])
def test_map_params(row, of_parameters):
    def of_shapes(params):  # may look inside the parameters
        return row.manifolds if params["scale"].ndim == 1 else None

    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        row.make(RATE, of_shapes if of_parameters else row.manifolds),
    )
    state = tx.init(row.problem()[0])
    mapped = optax.tree.map_params(tx, lambda x: x + 1, state)
    # Moments have the shapes of the parameters, counters are scalars.
    assert any(x.ndim == 3 for x in jax.tree.leaves(state))
    chex.assert_trees_all_equal(mapped, jax.tree.map(lambda x: x + (x.ndim > 0), state))


@each
def test_learning_rate_schedule(row):
    def once(count):
        return jnp.where(count == 0, RATE, 0.0)

    points = run(row.make(once, row.manifolds), *row.problem())
    assert_close(points[0], plain(row)[0])
    assert_close(points[1]["b"], points[0]["b"], row.within)


@each
def test_chain_after_clipping(row):
    params, gradients = row.problem()
    clipped = []
    for g in gradients:
        norm = np.sqrt(sum(np.sum(np.float64(x) ** 2) for x in jax.tree.leaves(g)))
        clipped.append(jax.tree.map(lambda x, n=norm: x * np.float32(0.5 / n), g))
    points = run(optax.chain(optax.clip_by_global_norm(0.5), row.tx), params, gradients)
    assert_close(points, run(row.tx, params, clipped))


@functools.cache
def unsharded(row):
    params, (g, _) = row.problem(layers=8)
    return jax.jit(row.tx.update)(g, row.tx.init(params), params)[0]


def sharded_update(row, axis, axis_type):
    """One step with the layers or the rows of the factors on eight devices."""
    params, (g, _) = row.problem(layers=8)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(axis_type,))

    def shard(x):
        along = x.ndim == 3 and x.shape[axis] == 8
        spec = jax.P(*("x" if along and k == axis else None for k in range(x.ndim)))
        return jax.device_put(x, jax.NamedSharding(mesh, spec))

    def same_sharding(x, y):
        return x.sharding.is_equivalent_to(y.sharding, x.ndim)

    with jax.set_mesh(mesh):
        params, g = jax.tree.map(shard, (params, g))
        state = jax.tree.map(shard, row.tx.init(params))
        update = jax.jit(row.tx.update).lower(g, state, params).compile()
        updates, after = update(g, state, params)
        assert all(jax.tree.leaves(jax.tree.map(same_sharding, params, updates)))
        assert all(jax.tree.leaves(jax.tree.map(same_sharding, state, after)))
    assert_close(jax.device_get(updates), unsharded(row))
    return str(update.as_text())


SHARDED = over(
    "adam",
    "stiefel_lora",
    "momentum-fixed",
    "loram",
    "landing",
    quick=("stiefel_lora", "momentum-fixed"),
)
EACH_MODE = pytest.mark.parametrize(
    "axis_type",
    slow_but([AxisType.Explicit], [AxisType.Explicit, AxisType.Auto]),
    ids=str,
)


@SHARDED
@EACH_MODE
def test_sharded_layers_need_no_communication(row, axis_type):
    program = sharded_update(row, 0, axis_type)
    assert "all-" not in program and "collective" not in program


@SHARDED
@EACH_MODE
def test_sharded_rows_all_reduce_small_matrices_only(row, axis_type):
    program = sharded_update(row, 1, axis_type)
    assert "all-gather" not in program and "collective" not in program
    shapes = re.findall(r"= (.+) all-reduce\(", program)
    sizes = [s for shape in shapes for s in re.findall(r"\[([\d,]*)\]", shape)]
    # And the largest entry of each of the eight matrices, one number.
    small = ("8", "8,1,1")
    assert sizes and all(size.endswith("3,3") or size in small for size in sizes)
    assert any(size.endswith("3,3") for size in sizes)
