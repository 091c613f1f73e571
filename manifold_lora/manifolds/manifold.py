"""The interface of a manifold, in the order in which the optimisers use it."""

import abc
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from manifold_lora.errors import InputError


class Manifold(abc.ABC):
    """A matrix manifold: a small frozen value, hashable and static under `jit`.

    A point is an array whose last two axes are the matrix (rows, columns); any
    axes before them are batch. Where factors are coupled a point is a dict of such
    arrays, and so are its tangents. The point always comes first in the arguments.
    Everything is computed in at least float32 and returned in the dtype of the
    point.
    """

    # The keys of a point that is a dict; empty where a point is an array.
    parts: ClassVar[tuple[str, ...]] = ()

    @abc.abstractmethod
    def project(self, x: Any, v: Any) -> Any:
        """The ambient v, orthogonally projected to the tangent space at x."""

    @abc.abstractmethod
    def riemannian_gradient(self, x: Any, g: Any) -> Any:
        """The Riemannian gradient at x of a function with Euclidean gradient g.

        Where the products of a finite g would overflow, g is shortened.
        """

    @abc.abstractmethod
    def retract(self, x: Any, v: Any) -> Any:
        """The point reached from x along the tangent v; R(x, 0) = x exactly."""

    def step(self, xs: Sequence[Any], ds: Sequence[Any]) -> list[Any]:
        """The points R(x, P_x(d)) reached from several points along ambient vectors.

        One call for all points of a program: a manifold may share work between the
        projection and the retraction, and between the points.
        """
        return [
            self.retract(x, self.project(x, d)) for x, d in zip(xs, ds, strict=True)
        ]

    @abc.abstractmethod
    def transport(self, x: Any, y: Any, v: Any) -> Any:
        """The tangent v at x carried to the tangent space at y."""

    @abc.abstractmethod
    def inner(self, x: Any, u: Any, v: Any) -> Array:
        """The metric ⟨u, v⟩ at x, one number per batch entry."""

    def norm(self, x: Any, v: Any) -> Array:
        """The length √⟨v, v⟩ of the tangent v at x, one number per batch entry."""
        return jnp.sqrt(self.inner(x, v, v))

    @abc.abstractmethod
    def random_point(
        self, key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32
    ) -> Any:
        """A random point of shape (…, rows, columns)."""

    def random_tangent(self, key: Array, x: Any) -> Any:
        """A tangent at x: standard normal matrices, projected."""
        if not self.parts:
            return self.project(x, jax.random.normal(key, jnp.shape(x), x.dtype))
        keys = dict(
            zip(self.parts, jax.random.split(key, len(self.parts)), strict=True)
        )
        normal = {k: jax.random.normal(keys[k], x[k].shape, x[k].dtype) for k in keys}
        return self.project(x, normal)

    @abc.abstractmethod
    def residual(self, x: Any) -> Array:
        """The constraint violation, its largest entry: one number per batch entry."""

    def is_point(self, node: Any) -> bool:
        """True for a mapping with the keys of a point, where points have parts."""
        return (
            bool(self.parts)
            and isinstance(node, Mapping)
            and set(node) == set(self.parts)
        )

    def check_shape(self, shape: Any) -> None:
        """Raise `InputError` if points of this manifold cannot have that shape.

        For a point with parts it is a dict of shapes.
        """
        if len(shape) < 2:
            raise InputError(
                f"{self} needs points of shape (…, rows, columns), got {shape}. "
                "Give this leaf Euclidean()."
            )
