"""The product of which attention, the head and the loss are made."""

import jax
import jax.numpy as jnp


def matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    """Product x y, accumulated in at least float32, at full precision if x is float32.

    Accelerators use fewer bits by default. The precision is set here rather than by
    `jax.default_matmul_precision`, since the rule of a `custom_vjp` is traced outside
    of the forward pass.

    >>> matmul(jnp.ones((2, 3), jnp.bfloat16), jnp.ones((3, 4), jnp.bfloat16)).dtype
    dtype('float32')
    """
    precision = "highest" if x.dtype == jnp.float32 else None
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.matmul(x, y, precision=precision, preferred_element_type=dtype)
