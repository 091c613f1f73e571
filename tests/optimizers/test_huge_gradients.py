"""Gradients near the end of float32, whose products would overflow."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import manifold_lora as ml
from tests.tolerances import RESIDUAL

MANIFOLDS = {
    "canonical": ml.Stiefel(),
    "euclidean": ml.Stiefel(metric="euclidean"),
    "oblique": ml.Oblique(),
}


@pytest.mark.parametrize("size", [1e20, 1e38])
@pytest.mark.parametrize("name", MANIFOLDS)
def test_a_huge_gradient_moves_its_own_layer_on_the_manifold(name: str, size: float):
    manifold = MANIFOLDS[name]
    x = manifold.random_point(jax.random.key(0), (3, 64, 4))
    scales = jnp.array([1, size, 0]).reshape(3, 1, 1)
    g = scales * jax.random.uniform(jax.random.key(1), x.shape)
    tx = ml.riemannian(optax.adam(1e-2), manifold)
    step = jax.jit(lambda g: tx.update(g, tx.init(x), x)[0])
    u = step(g)
    assert manifold.residual(x + u).max() < RESIDUAL
    assert jnp.abs(u[1]).max() > 1e-3 and not u[2].any()
    # The other layers move as they do without it, bit for bit.
    np.testing.assert_array_equal(u[0], step(g.at[1].set(0))[0])
