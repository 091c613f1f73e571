"""Factors described leaf by leaf, in trees whose names say nothing."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import manifold_lora as ml
from manifold_lora import FactorDims, FactorSpec, FactorTree
from tests.optimizers.factor_layouts import (
    LAYOUTS,
    assert_product,
    draw_factor,
    layouts,
)
from tests.tolerances import RESIDUAL

A, B = FactorDims("a"), FactorDims("b")


def dims_of(spec):
    return (
        FactorDims("a", spec.a_rank_axis, spec.layer_axes),
        FactorDims("b", spec.b_rank_axis, spec.layer_axes),
    )


@layouts
def test_tall_factors_have_the_product_of_their_layout(layout):
    spec, a_shape, b_shape, *_ = LAYOUTS[layout]
    a, b = draw_factor(a_shape, 0), draw_factor(b_shape, 1)
    params = {"x": [a, b, np.ones(3)], "y": np.ones((2, 2))}
    factors = FactorTree({"x": [*dims_of(spec), None], "y": None})
    assert factors.pairs(params) == [("x/0", "x/1")]
    tall = factors.to_tall(params)
    assert_product(layout, a, b, *tall["x"][:2])
    assert tall["x"][2] is params["x"][2] and tall["y"] is params["y"]
    chex.assert_trees_all_equal(factors.from_tall(tall, params), params)


def maxtext():
    """Two modules scanned over axis 1, with orthonormal B of (heads, head_dim) rows."""
    a, b = dims_of(LAYOUTS["scan-1"][0])
    shapes = {"p": (5, 6, 3), "q": (3, 6, 4, 2)}
    params = {
        "m": {k: draw_factor(shape, 0) for k, shape in shapes.items()},
        "n": {k: draw_factor(shape, 1) for k, shape in shapes.items()},
        "z": np.ones(3, "float32"),
    }
    return params, {"m": {"p": a, "q": b}, "n": {"p": a, "q": b}, "z": None}


def test_layers_on_axis_1_stay_orthonormal():
    params, dims = maxtext()
    factors = FactorTree(lambda params: dims)
    params = factors.init(jax.random.key(0), params)
    tx = factors.tall(ml.riemannian(optax.adam(0.1), factors.manifolds()))

    @chex.assert_max_traces(1)
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    step, state, start = jax.jit(step), tx.init(params), params
    for seed in (2, 3):
        grads = jax.tree.map(lambda x, seed=seed: draw_factor(x.shape, seed), params)
        params, state = step(params, state, grads)
    chex.assert_trees_all_equal_shapes_and_dtypes(params, start)
    for module in ("m", "n"):
        assert np.max(np.abs(params[module]["q"] - start[module]["q"])) > 0.1
        b = np.float64(params[module]["q"])  # (r, layers, heads, head_dim)
        gram = np.einsum("rlnh,slnh->lrs", b, b)
        assert np.max(np.abs(gram - np.eye(3))) < RESIDUAL


@pytest.mark.parametrize("make", [ml.scaled_gd, ml.lora_plus])
@pytest.mark.parametrize("given", ["tree", "function", "FactorTree"])
def test_baselines_take_dims_as_they_take_names(make, given):
    x, y = draw_factor((5, 3), 0), draw_factor((3, 8), 1)
    named = {"lora_a": x, "lora_b": y, "z": np.ones(3, "float32")}
    dims = {"x": A, "y": FactorDims("b", rank_axis=0), "z": None}
    pairs = {"tree": dims, "function": lambda _: dims, "FactorTree": FactorTree(dims)}

    def updates(tx, params):
        return jax.jit(tx.update)(params, tx.init(params), params)[0]

    expected = updates(make(0.1, ml.NNX_LORA), named)
    unnamed = dict(zip(dims, named.values(), strict=True))
    result = updates(make(0.1, pairs[given]), unnamed)
    chex.assert_trees_all_equal(list(result.values()), list(expected.values()))


def test_dims_on_a_sub_tree_pair_its_leaves():
    ones = {"q": np.ones((4, 2)), "k": [np.ones((6, 2))]}
    params = {"left": ones, "right": ones, "rest": ones}
    expected = [("left/k/0", "right/k/0"), ("left/q", "right/q")]
    for dims in (
        {"left": A, "right": B, "rest": None},
        {"left": FactorDims("a", pair=7), "right": FactorDims("b", pair=7),
         "rest": None},
    ):  # fmt: skip
        assert FactorTree(dims).pairs(params) == expected


def test_pairs_that_are_not_siblings():
    x = np.ones((4, 2))
    params = {"in": [x, x], "out": [x, x]}
    a, b = (
        [FactorDims(side, pair=name) for name in ("one", "two")] for side in ("a", "b")
    )
    assert FactorTree({"in": a, "out": b[::-1]}).pairs(params) == [
        ("in/0", "out/1"),
        ("in/1", "out/0"),
    ]


def test_an_nnx_state_takes_a_nested_dict_of_dims():
    class Module(nnx.Module):
        def __init__(self):
            self.x = nnx.LoRAParam(jnp.asarray(draw_factor((5, 3), 0)))
            self.y = nnx.LoRAParam(jnp.asarray(draw_factor((3, 8), 1)))

    class Model(nnx.Module):
        def __init__(self):
            self.layer = Module()

    state = nnx.state(Model())
    dims = {"layer": {"x": A, "y": FactorDims("b", rank_axis=0)}}
    tx = ml.scaled_gd(0.1, dims)
    updates: Any = tx.update(state, tx.init(state), state)[0]
    chex.assert_trees_all_equal_structs(updates, state)
    pure = nnx.to_pure_dict(state)
    expected, _ = tx.update(pure, tx.init(pure), pure)
    chex.assert_trees_all_equal(nnx.to_pure_dict(updates), expected)


ONES = np.ones((3, 2))


@pytest.mark.parametrize(
    ("dims", "params", "message"),
    [
        ({"x": A}, {"y": ONES}, "The tree of factor dimensions is not a prefix"),
        ({"x": "a"}, {"x": ONES}, "x: 'a' does not describe a factor"),
        ({"x": FactorDims("A")}, {"x": ONES}, r"x: FactorDims\(side='A'.*does not"),  # pyright: ignore[reportArgumentType]
        ({"x": None}, {"x": ONES}, r'matches FactorDims\("a"\).*leaves are x'),
        ({"x": A, "y": None}, {"x": ONES, "y": ONES},
         r'x has no partner FactorDims\("b"\).*partition by module'),
        ({"x": A, "y": A, "z": B}, dict.fromkeys("xyz", ONES),
         r'x, y are all FactorDims\("a"\) of one pair'),
        ([A, B], [ONES, np.ones((3, 4))], "rank 2, 1 has .* and 4. Correct their"),
        ([A._replace(layer_axes=(3,)), B], [ONES, ONES], r"0 of shape \(3, 2\)"),
    ],
)  # fmt: skip
def test_dims_that_do_not_fit(dims, params, message):
    with pytest.raises(ml.InputError, match=message):
        FactorTree(dims).pairs(params)
    with pytest.raises(ml.InputError, match=message):
        ml.lora_plus(0.1, dims).init(params)


def test_a_spec_describes_its_leaves():
    params = {"w_lora_a": ONES, "w_lora_b": ONES, "norm": ONES}
    assert FactorSpec("*_lora_a", "*_lora_b", b_rank_axis=0).dims(params) == {
        "w_lora_a": FactorDims("a", pair=(None, "w")),
        "w_lora_b": FactorDims("b", rank_axis=0, pair=(None, "w")),
        "norm": None,
    }
