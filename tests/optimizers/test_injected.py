"""`optax.inject_hyperparams` around every recipe, with plain trees."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import manifold_lora as ml
from tests.cases import slow_but
from tests.tolerances import HYPERPARAMETER

RATE = 0.1
STIEFEL, FREE = ml.Stiefel(), ml.Euclidean()
TREE = {"a": FREE, "b": STIEFEL}
BOUNDED = {"a": FREE, "b": ml.BoundedRank()}
SPEC = ml.FactorSpec()


def scheduled(learning_rate, manifolds):
    """Riemannian Adam as a function of its rate."""
    return ml.riemannian(optax.adam(learning_rate), manifolds)


def landed(learning_rate, manifolds):
    return ml.landing(optax.adam(learning_rate), manifolds)


RECIPES = {
    "riemannian": (scheduled, {"manifolds": TREE}),
    "landing": (landed, {"manifolds": TREE}),
    "stella": (ml.stella, {"manifolds": TREE, "hidden_size": 16}),
    "stiefel_lora": (ml.stiefel_lora, {"manifolds": TREE}),
    "landing_adamw": (ml.landing_adamw, {"manifolds": TREE}),
    "loram": (ml.loram, {"manifolds": BOUNDED}),
    "loram-stiefel": (ml.loram, {"manifolds": TREE}),
    "scaled_gd": (ml.scaled_gd, {"pairs": SPEC}),
    "lora_plus": (ml.lora_plus, {"pairs": SPEC}),
}


def problem(options) -> Any:
    manifold = options.get("manifolds", TREE)["b"]
    shape = (8, 8, 2) if manifold.parts else (8, 2)
    b = manifold.random_point(jax.random.key(0), shape)
    params = {"a": jnp.ones((6, 2)), "b": b}
    grads = jax.tree.map(lambda x: jnp.sin(7 * x) + 0.5, params)
    return params, grads


@pytest.mark.parametrize(
    ("recipe", "options"),
    slow_but([RECIPES["riemannian"], RECIPES["stella"]], RECIPES.values()),
    ids=RECIPES,
)
def test_plain_trees_need_no_static_arguments(recipe, options):
    params, grads = problem(options)
    results = []
    tx: Any = None
    for make in (recipe, optax.inject_hyperparams(recipe)):
        tx = make(learning_rate=RATE, **options)
        state = tx.init(params)
        updates, state = jax.jit(tx.update)(grads, state, params)
        results.append(optax.apply_updates(params, updates))
    plain, injected = (jax.tree.leaves(r) for r in results)
    for x, y in zip(plain, injected, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=HYPERPARAMETER)
    # A rate that is changed in the state takes effect.
    for rate in {"learning_rate", "free_learning_rate"} & set(state.hyperparams):
        state.hyperparams[rate] = jnp.zeros(())
    updates, _ = tx.update(grads, state, params)
    assert float(jnp.abs(updates["a"]).max()) == 0


@pytest.mark.parametrize("recipe", [ml.stella, ml.stiefel_lora, ml.landing_adamw])
def test_functions_are_named_in_static_args(recipe):
    params, grads = problem({})
    make = optax.inject_hyperparams(recipe)
    with pytest.raises(Exception, match=r"inner.*static_args"):
        make(RATE, TREE, inner=optax.sgd).init(params)
    tx: Any = optax.inject_hyperparams(recipe, static_args=("inner", "manifolds"))(
        RATE, lambda params: TREE, inner=optax.sgd
    )
    updates, _ = tx.update(grads, tx.init(params), params)
    plain: Any = recipe(RATE, TREE, inner=optax.sgd)
    expected, _ = plain.update(grads, plain.init(params), params)
    np.testing.assert_allclose(updates["a"], expected["a"], atol=HYPERPARAMETER)
