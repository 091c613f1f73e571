"""Any Optax optimiser on a manifold: the leading eigenvectors of a matrix.

    python examples/01_riemannian_optax.py

Maximises tr XᵀAX over matrices with orthonormal columns, with Adam, in a chain with
clipping, on a parameter tree that also has an ordinary leaf.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import manifold_lora as ml

key = jax.random.key(0)
a = jax.random.normal(key, (100, 100))
a = a @ a.T / 100

params = {
    "x": ml.Stiefel().random_point(key, (100, 5)),
    "shift": jnp.zeros(()),  # an ordinary parameter, with its minimum at 1
}
manifolds = {"x": ml.Stiefel("polar"), "shift": ml.Euclidean()}


def loss(params):
    """Minus the trace, and a parabola."""
    x = params["x"]
    return -jnp.trace(x.T @ a @ x) + (params["shift"] - 1) ** 2


schedule = optax.cosine_decay_schedule(3e-2, 1000)
tx = optax.chain(
    optax.clip_by_global_norm(1.0),  # before riemannian
    ml.riemannian(optax.adam(schedule), manifolds),  # last in the chain
)


@jax.jit
def step(params, state):
    """One step of gradient descent, as with any Optax optimiser."""
    value, grads = jax.value_and_grad(loss)(params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, value


state = tx.init(params)
for number in range(1000):
    params, state, value = step(params, state)
    if number % 200 == 0:
        residual = float(ml.Stiefel().residual(params["x"]))
        print(
            f"step {number:4}: loss {value:9.5f}, constraint violation {residual:.1e}"
        )

best = 0 - np.linalg.eigvalsh(np.asarray(a, np.float64))[-5:].sum()
print(f"reached {loss(params):.5f}, the optimum is {best:.5f}")
