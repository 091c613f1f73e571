"""The optimisers on other trees: prefix trees, classes, flax.nnx."""

import dataclasses
from typing import Any, NamedTuple

import chex
import jax
import pytest
from flax import nnx

import manifold_lora as ml
from tests.optimizers.table import (
    RATE,
    free_leaves,
    over,
    plain,
    run,
)


@over("adam", "stiefel_lora", quick=["stiefel_lora"])
def test_prefix_trees_and_functions(row):
    params, gradients = row.problem()
    free = ml.Euclidean()

    def nest(tree):
        return {"layers": {"q": tree["b"], "k": -tree["b"]}, "rest": free_leaves(tree)}

    params, gradients = nest(params), [nest(g) for g in gradients]
    expected = run(row.make(RATE, row.of_shapes(params)), params, gradients)
    for manifolds in ({"layers": row.manifold, "rest": free}, row.of_shapes):
        chex.assert_trees_all_equal(
            run(row.make(RATE, manifolds), params, gradients), expected
        )
    layers = [g["layers"] for g in gradients]
    points = run(row.make(RATE, row.manifold), params["layers"], layers)
    chex.assert_trees_all_equal(points, [p["layers"] for p in expected])


class Factors(NamedTuple):
    a: Any
    b: Any
    scale: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Adapter:
    a: Any
    b: Any
    scale: Any


class Module(nnx.Module):
    def __init__(self, a, b, scale):
        self.a, self.b, self.scale = nnx.Param(a), nnx.Param(b), nnx.Param(scale)


def state_of(a, b, scale):
    return nnx.state(Module(a, b, scale), nnx.Param)


# How to build the parameters, and the tree of manifolds that goes with them.
CONTAINERS = {
    "NamedTuple": (Factors, Factors),
    "dataclass": (Adapter, Adapter),
    "nnx.State": (state_of, lambda **manifolds: nnx.State(manifolds)),
    "pure dict": (lambda **x: nnx.to_pure_dict(state_of(**x)), dict),
}


@over("momentum-qr", "stiefel_lora")
@pytest.mark.parametrize(("build", "tree"), CONTAINERS.values(), ids=CONTAINERS)
def test_containers(row, build, tree):
    params, gradients = row.problem()
    params, gradients = build(**params), [build(**g) for g in gradients]
    for manifolds in (tree(**row.manifolds), row.of_shapes):
        points = run(row.make(RATE, manifolds), params, gradients)
        for point, expected in zip(points, plain(row), strict=True):
            assert jax.tree.structure(point) == jax.tree.structure(params)
            chex.assert_trees_all_equal(
                jax.tree.leaves(point), jax.tree.leaves(expected)
            )


@over("momentum-qr", "stiefel_lora")
def test_nnx_optimizer(row):
    params, gradients = row.problem()
    for manifolds in (nnx.State(row.manifolds), row.of_shapes):
        module = Module(**params)
        with jax.disable_jit():
            tx = row.make(RATE, manifolds)
            optimizer = nnx.Optimizer(module, tx, wrt=nnx.Param)
            for g in gradients:
                optimizer.update(module, state_of(**g))
        chex.assert_trees_all_equal(nnx.to_pure_dict(nnx.state(module)), plain(row)[-1])
