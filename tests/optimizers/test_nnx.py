"""The optimisers on the `nnx.State` of an adapted LLaMA and of `nnx.grad`."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import manifold_lora as ml
from tests.cases import slow_but
from tests.tiny import CONFIG
from tests.tolerances import FLOAT32

RECIPES = {
    "riemannian": ("stiefel", lambda tree: ml.riemannian(optax.adam(0.01), tree)),
    "stiefel_lora": ("stiefel", lambda tree: ml.stiefel_lora(0.1, tree)),
    "stella": ("stella", lambda tree: ml.stella(0.01, tree, hidden_size=32)),
    "loram_fr": ("loram_fr", lambda tree: ml.loram(0.01, tree)),
    "loram_br": ("loram_br", lambda tree: ml.loram(0.01, tree, nuclear_decay=1e-3)),
    "landing": ("landing_oblique", lambda tree: ml.landing(optax.adam(0.01), tree)),
    "landing_adamw": ("landing_stiefel", lambda tree: ml.landing_adamw(0.01, tree)),
    "scaled_gd": ("lora", lambda _: ml.scaled_gd(0.01, ml.FactorSpec())),
    "lora_plus": ("lora", lambda _: ml.lora_plus(0.01, ml.FactorSpec())),
}
QUICK = [RECIPES[name] for name in ("riemannian", "landing", "scaled_gd")]
recipes = pytest.mark.parametrize(
    ("method", "make"), slow_but(QUICK, RECIPES.values()), ids=RECIPES
)


def adapted(method):
    model = ml.Llama(CONFIG, rngs=nnx.Rngs(0))
    targets = ("q_proj", "v_proj")
    ml.attach(model, ml.AdapterConfig(method, rank=2, targets=targets), seed=0)
    return model


@recipes
def test_a_state_gets_the_updates_of_its_pure_dict(method, make):
    model = adapted(method)
    tx, params, pure = (
        make(ml.manifold_tree(model)),
        ml.factors(model),
        nnx.to_pure_dict,
    )
    state = nnx.state(model, nnx.LoRAParam)
    grads = optax.tree.random_like(jax.random.key(0), state)

    @jax.jit
    def both(params, state, grads):
        expected, _ = tx.update(pure(grads), tx.init(params), params)
        return tx.update(grads, tx.init(state), state)[0], expected

    updates, expected = both(params, state, grads)
    chex.assert_tree_all_finite(expected)
    chex.assert_trees_all_equal_structs(updates, state)
    chex.assert_trees_all_close(pure(updates), expected, rtol=0, atol=FLOAT32)

    with pytest.raises(ml.InputError, match=r"nnx\.to_pure_dict"):
        tx.update(grads, tx.init(params), params)


@nnx.jit
def gradient(model, ids):
    def loss(model):
        return jnp.mean(model(ids) ** 2)

    return nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)


@pytest.mark.parametrize("name", slow_but(["stella"], ["stella", "loram_br"]))
def test_steps_with_nnx_grad_and_nnx_optimizer(name):
    method, make = RECIPES[name]
    model = adapted(method)
    tx, params = make(ml.manifold_tree(model)), ml.factors(model)
    grads = gradient(model, jnp.arange(12).reshape(2, 6))
    pure = nnx.to_pure_dict(grads)
    updates, _ = jax.jit(tx.update)(pure, tx.init(params), params)
    expected = optax.apply_updates(params, updates)

    state = nnx.state(model, nnx.LoRAParam)
    updates, _ = jax.jit(tx.update)(grads, tx.init(state), state)
    point: Any = optax.apply_updates(state, updates)
    chex.assert_trees_all_equal(nnx.to_pure_dict(point), expected)

    optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)
    nnx.jit(lambda model, optimizer: optimizer.update(model, grads))(model, optimizer)
    chex.assert_trees_all_close(ml.factors(model), expected, rtol=0, atol=FLOAT32)
