"""What every manifold offers, in the order the optimisers use it."""

import abc
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from manifold_lora.errors import InputError


class Manifold(abc.ABC):
    """A matrix manifold: a small frozen value, hashable and static under `jit`.

    A point is an array whose last two axes are the matrix (rows, columns); any
    axes before them are batch. The point always comes first in the arguments.
    Everything is computed in at least float32 and returned in the dtype of the
    point.
    """

    @abc.abstractmethod
    def project(self, x: Any, v: Any) -> Any:
        """The ambient v orthogonally projected to the tangent space at x."""

    @abc.abstractmethod
    def riemannian_gradient(self, x: Any, g: Any) -> Any:
        """The Riemannian gradient at x of a function with Euclidean gradient g."""

    @abc.abstractmethod
    def retract(self, x: Any, v: Any) -> Any:
        """The point reached from x along the tangent v; R(x, 0) = x exactly."""

    @abc.abstractmethod
    def transport(self, x: Any, y: Any, v: Any) -> Any:
        """The tangent v at x carried to the tangent space at y."""

    @abc.abstractmethod
    def inner(self, x: Any, u: Any, v: Any) -> Array:
        """The metric ⟨u, v⟩ at x, one number for each batch entry."""

    def norm(self, x: Any, v: Any) -> Array:
        """The length √⟨v, v⟩ of the tangent v at x, one number a batch entry."""
        return jnp.sqrt(self.inner(x, v, v))

    @abc.abstractmethod
    def random_point(
        self, key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32
    ) -> Any:
        """A random point of shape (…, rows, columns)."""

    def random_tangent(self, key: Array, x: Any) -> Any:
        """A tangent at x: a standard normal matrix, projected."""
        return self.project(x, jax.random.normal(key, jnp.shape(x), x.dtype))

    @abc.abstractmethod
    def residual(self, x: Any) -> Array:
        """The largest violation of the constraint, one number a batch entry."""

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Raise `InputError` if no point of this manifold has that shape."""
        if len(shape) < 2:
            raise InputError(
                f"{self} needs points of shape (…, rows, columns), got {shape}. "
                "Give this leaf Euclidean()."
            )
