"""Numbers, parameters, gradients and states that no optimiser can use are refused."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import manifold_lora as ml
from tests.cases import slow_but
from tests.optimizers.table import OPTIMIZERS
from tests.tolerances import ANY_STEP, BFLOAT16

STIEFEL, FREE = ml.Stiefel(), ml.Euclidean()
TREE = {"a": FREE, "b": STIEFEL}
RECIPES = {
    "stella": functools.partial(ml.stella, manifolds=TREE),
    "stiefel_lora": functools.partial(ml.stiefel_lora, manifolds=TREE),
    "loram": functools.partial(ml.loram, manifolds=TREE),
    "landing_adamw": functools.partial(ml.landing_adamw, manifolds=TREE),
    "scaled_gd": functools.partial(ml.scaled_gd, pairs=ml.FactorSpec()),
    "lora_plus": functools.partial(ml.lora_plus, pairs=ml.FactorSpec()),
}
each = pytest.mark.parametrize(("name", "make"), RECIPES.items(), ids=RECIPES)


def problem(dtype="float32") -> Any:
    b = ml.Stiefel().random_point(jax.random.key(0), (8, 2), dtype)
    params = {"a": jnp.ones((6, 2), dtype), "b": b}
    return params, jax.tree.map(lambda x: jnp.sin(7 * x), params)


@each
@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("learning_rate", float("nan"), "learning_rate ≥ 0 and finite, got nan"),
        ("learning_rate", -1e-3, "learning_rate ≥ 0 and finite, got -0.001"),
        ("learning_rate", float("inf"), "got inf"),
        ("b1", 1.0, "0 ≤ b1 < 1, got 1.0"),
        ("b2", -0.1, "0 ≤ b2 < 1, got -0.1"),
        ("b2", float("nan"), "0 ≤ b2 < 1, got nan"),
        ("eps", -1e-8, "eps ≥ 0 and finite"),
        ("weight_decay", float("nan"), "weight_decay ≥ 0"),
    ],
)
def test_numbers_out_of_range(name, make, option, value, message):
    with pytest.raises(ml.InputError, match=message) as error:
        make(**({"learning_rate": 0.1} | {option: value}))
    assert error.match(f"^{name} needs")


@each
def test_numbers_at_the_edge_and_arrays_pass(name, make):
    make(0.0, b1=0.0, b2=0.0, eps=0.0)
    make(jnp.float32(-1), b1=jnp.float32(2))
    make(lambda count: -1.0)


def test_the_rate_of_free_leaves():
    with pytest.raises(ml.InputError, match="free_learning_rate ≥ 0"):
        ml.stiefel_lora(0.1, TREE, free_learning_rate=-1.0)


MAKERS = {name: (lambda make=make: make(0.1)) for name, make in RECIPES.items()} | {
    "riemannian": lambda: ml.riemannian(optax.adam(0.1), TREE),
    "landing": lambda: ml.landing(optax.adam(0.1), TREE),
}
on_manifolds = pytest.mark.parametrize(
    "name", [name for name in MAKERS if name not in ("scaled_gd", "lora_plus")]
)
every = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


@every
@pytest.mark.parametrize("shape", [(1, 2), (8, 1), (2,), ()], ids=str)
def test_gradients_that_broadcast(make, shape):
    params, grads = problem()
    tx: Any = make()
    with pytest.raises(ml.InputError, match=r"\['b'\]: .* for \(8, 2\)"):
        tx.update(grads | {"b": jnp.ones(shape)}, tx.init(params), params)


@every
@pytest.mark.parametrize(
    "b",
    slow_but([{"b": (5, 2)}], [{"b": (5, 2)}, {"c": (8, 2)}, {"b": (1, 2)}]),
    ids=str,
)
def test_a_state_of_other_parameters(make, b):
    params, grads = problem()
    other = {"a": params["a"]} | {
        k: jnp.eye(*shape) if shape[0] > 1 else jnp.ones(shape)
        for k, shape in b.items()
    }
    tx: Any = make()
    state = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype),
        jax.eval_shape(optax.adam(0.1).init, other),
    )
    with pytest.raises(ml.InputError, match="a state of other parameters"):
        tx.update(grads, state, params)
    mine = tx.init(params)
    broadcast = jax.tree.map(lambda x: x[:1] if x.shape == (8, 2) else x, mine)
    with pytest.raises(ml.InputError, match="a state of other parameters"):
        tx.update(grads, broadcast, params)


@pytest.mark.parametrize(
    "name", [n for n in MAKERS if n not in ("scaled_gd", "lora_plus")]
)
@pytest.mark.parametrize("dtype", ["int32", "complex64", "bool"])
def test_points_that_are_not_real_floats(name, dtype):
    params, _ = problem()
    for trace in (lambda f: f, jax.jit):
        with pytest.raises(ml.InputError, match=rf"\['b'\]: .* got {dtype}.*float32"):
            trace(MAKERS[name]().init)(params | {"b": jnp.eye(8, 2, dtype=dtype)})


@pytest.mark.parametrize(
    "name",
    slow_but(
        ["stella", "landing"],
        [n for n in MAKERS if n not in ("scaled_gd", "lora_plus")],
    ),
)
def test_float16_points_are_computed_in_float32(name):
    params, grads = problem("float16")
    grads = {"a": grads["a"], "b": grads["b"] * jnp.asarray(1e-3, "float16")}
    grads["b"] = grads["b"].at[:, 0].set(0)  # 0/(0 + ε) with ε = 0 in float16
    tx: Any = MAKERS[name]()
    state, wide = tx.init(params), jax.tree.map(lambda x: x.astype("float32"), params)
    expected, _ = tx.update(
        jax.tree.map(lambda x: x.astype("float32"), grads), jax.jit(tx.init)(wide), wide
    )
    updates, state = jax.jit(tx.update)(grads, state, params)
    assert updates["b"].dtype == jnp.float16
    got = np.float32(params["b"] + updates["b"])
    want = np.float32(wide["b"] + expected["b"])
    np.testing.assert_allclose(got, want, rtol=0, atol=BFLOAT16 / 8)
    for _ in range(20):
        params = {"a": params["a"], "b": params["b"] + updates["b"]}
        updates, state = tx.update(grads, state, params)
    assert np.isfinite(np.float32(params["b"])).all()


GEOMETRIES = {
    "polar": ml.Stiefel(),
    "qr": ml.Stiefel("qr", "euclidean"),
    "cayley": ml.Stiefel("cayley"),
    "exp": ml.Stiefel("exp"),
    "oblique": ml.Oblique(),
    "oblique-exp": ml.Oblique("exp"),
    "fixed": ml.FixedRank("orthographic"),
    "bounded": ml.BoundedRank(order=2),
}
SIZES = st.one_of(
    st.just(0.0), st.floats(-45, 38).map(lambda e: 10.0**e), st.just(3.4e38)
)


@functools.cache
def descent(name, gradient):
    manifold = GEOMETRIES[name]
    tx = ml.riemannian(optax.sgd(0.5), manifold, gradient=gradient)

    @jax.jit
    def steps(x, g):
        state = tx.init(x)
        for _ in range(2):
            updates, state = tx.update(g, state, x)
            x = optax.apply_updates(x, updates)
        return x, manifold.residual(x)

    return steps


@pytest.mark.parametrize(
    "gradient", slow_but(["riemannian"], ["riemannian", "euclidean"])
)
@pytest.mark.parametrize(
    "name", slow_but(["polar", "oblique", "fixed", "bounded"], GEOMETRIES)
)
@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 2**32 - 1), size=SIZES, entry=SIZES)
def test_any_finite_gradient_keeps_the_constraint(name, gradient, seed, size, entry):
    manifold, rng = GEOMETRIES[name], np.random.default_rng(seed)
    shape = (3, 6, 7, 2) if manifold.parts else (3, 7, 2)
    x = manifold.random_point(jax.random.key(seed % 97), shape)

    def one(part):
        g = size * rng.uniform(-1, 1, part.shape)
        g[0, 0, 0] = entry
        g[1] *= rng.integers(2)
        return g.astype("float32")

    y, residual = descent(name, gradient)(x, jax.tree.map(one, x))
    assert all(np.isfinite(part).all() for part in jax.tree.leaves(y))
    assert (residual < ANY_STEP).all()


def test_every_optimizer_of_the_table_survives_the_largest_gradient():
    for row in OPTIMIZERS.values():
        params, gradients = row.problem()
        g = jax.tree.map(lambda x: jnp.full_like(x, 3e38), gradients[0])
        tx: Any = row.tx
        updates, _ = jax.jit(tx.update)(g, tx.init(params), params)
        moved: Any = optax.apply_updates(params, updates)
        if row.free is not None:
            assert (row.manifold.residual(moved["b"]) < max(row.within, ANY_STEP)).all()
