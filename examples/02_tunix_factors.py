"""Factors with Tunix's names and shapes: an orthonormal B in an unmodified model.

    python examples/02_tunix_factors.py

Qwix, which gives Tunix its LoRA, puts two factors beside a weight w: w_lora_a, (in, r),
and w_lora_b, (r, out), where in and out may be several axes, such as heads and
head_dim. Here the layers are scanned over axis 0 as well. A `FactorSpec` describes this
once; the optimiser then sees every B as (layers, rows, r). Where names do not tell the
factors apart, `ml.FactorTree` takes `ml.FactorDims` leaf by leaf instead. The toy task,
least squares, has a known optimum: the best approximation of rank r.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

import manifold_lora as ml

layers, width, heads, head_dim, r = 6, 32, 4, 8, 4
params = {
    "attn": {
        "q_einsum": {  # btd,dnh->btnh
            "w_lora_a": jnp.zeros((layers, width, r)),
            "w_lora_b": jnp.zeros((layers, r, heads, head_dim)),
        },
        "attn_vec_einsum": {  # btnh,nhd->btd
            "w_lora_a": jnp.zeros((layers, heads, head_dim, r)),
            "w_lora_b": jnp.zeros((layers, r, width)),
        },
    },
    "final_norm": {"scale": jnp.zeros(width)},  # an ordinary parameter
}
q_key, o_key, b_key = jax.random.split(jax.random.key(0), 3)
q_target = jax.random.normal(q_key, (layers, width, heads, head_dim)) / width**0.5
o_target = jax.random.normal(o_key, (layers, heads, head_dim, width)) / width**0.5


def loss(params):
    """Squared errors of the updates, and of the scale from 1."""
    q, o = params["attn"]["q_einsum"], params["attn"]["attn_vec_einsum"]
    q_delta = jnp.einsum("ldr,lrnh->ldnh", q["w_lora_a"], q["w_lora_b"])
    o_delta = jnp.einsum("lnhr,lrd->lnhd", o["w_lora_a"], o["w_lora_b"])
    rest = params["final_norm"]["scale"] - 1
    errors = (q_delta - q_target, o_delta - o_target, rest)
    return sum(jnp.sum(error**2) for error in errors)


spec = dataclasses.replace(ml.QWIX_LORA, layer_axes=(0,))
for a, b in spec.pairs(params):
    print(f"{a} and {b}")
# B = 0, LoRA's initialisation, is not orthonormal: take a random B, and A = 0.
params = spec.init(b_key, params, b=ml.Stiefel())
manifolds = spec.manifolds(b=ml.Stiefel())
schedule = optax.cosine_decay_schedule(5e-2, 300)
tx = spec.tall(ml.riemannian(optax.adam(schedule), manifolds))


@jax.jit
def step(params, state):
    """One step, as with any Optax optimiser."""
    value, grads = jax.value_and_grad(loss)(params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, value


@jax.jit
def residual(params):
    """The constraint violations of the two B, in the worst layer."""
    modules = spec.to_tall(params)["attn"].values()
    return jnp.array([ml.Stiefel().residual(m["w_lora_b"]).max() for m in modules])


state = tx.init(params)
for number in range(300):
    params, state, value = step(params, state)
    if number % 50 == 0:
        violation = residual(params).max()
        print(
            f"step {number:3}: loss {value:9.5f}, constraint violation {violation:.1e}"
        )

tails = [
    np.linalg.svd(np.float64(target).reshape(layers, 32, 32), compute_uv=False)[:, r:]
    for target in (q_target, o_target)
]
least = sum(np.sum(s**2) for s in tails)
print(f"reached {loss(params):.5f}, the optimum of rank {r} is {least:.5f}")
