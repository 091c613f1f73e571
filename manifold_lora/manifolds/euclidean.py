"""The Euclidean space of all arrays, for unconstrained parameters."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from manifold_lora.manifolds.manifold import Manifold


@dataclasses.dataclass(frozen=True)
class Euclidean(Manifold):
    """No constraint. Points may have any shape; every operation is trivial.

    The optimisers pass Euclidean leaves straight through, so that with this
    manifold everywhere they are the plain Optax optimiser bit for bit.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifold_lora as ml
        >>> ml.Euclidean().retract(jnp.ones(3), jnp.full(3, 2.0)).tolist()
        [3.0, 3.0, 3.0]
    """

    def project(self, x: Array, v: Array) -> Array:
        """Return v itself."""
        del x
        return v

    def riemannian_gradient(self, x: Array, g: Array) -> Array:
        """Return g itself."""
        del x
        return g

    def retract(self, x: Array, v: Array) -> Array:
        """The sum x + v."""
        return x + v

    def transport(self, x: Array, y: Array, v: Array) -> Array:
        """Return v itself."""
        del x, y
        return v

    def inner(self, x: Array, u: Array, v: Array) -> Array:
        """The metric tr uᵀv, over the last two axes."""
        del x
        return jnp.sum(u * v, axis=tuple(range(max(u.ndim - 2, 0), u.ndim)))

    def random_point(
        self, key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32
    ) -> Array:
        """Standard normal entries."""
        return jax.random.normal(key, shape, dtype)

    def residual(self, x: Array) -> Array:
        """Zero: there is no constraint."""
        return jnp.zeros(jnp.shape(x)[:-2], jnp.float32)

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Accept any shape."""
        del shape
