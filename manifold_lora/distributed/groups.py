"""Functions of a batch, computed by every group of devices on rows of its own.

A group is the devices that share rows of a batch: those with one place on the data
and fsdp axes. Each computes with a whole copy of the factors, which is gathered once,
and keeps its own gradients, which are summed once: neither costs an exchange a layer
or a micro-batch.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import P

from manifold_lora.distributed.mesh import GROUPS, group_count
from manifold_lora.distributed.sharding import ambient, constrain, kept, used


def _present() -> tuple[int, tuple[str, ...]]:
    """The number of groups on the ambient mesh, and the axes that they differ in."""
    mesh = ambient()
    if mesh is None:
        return 1, ()
    return group_count(mesh.shape), tuple(a for a in GROUPS if a in mesh.shape)


def copies(factors: Any, axes: Any) -> Any:
    """One copy of the factors for each group: (…) to (groups, …)."""
    count, names = _present()

    def copy(x: jax.Array, axis: Any) -> jax.Array:
        mesh = ambient()
        if mesh is None:
            return x[None]
        x = constrain(x, used(axis, x.shape, mesh))
        spec = P(names, *used(axis, x.shape, mesh))
        return constrain(jnp.broadcast_to(x, (count, *x.shape)), spec)

    return jax.tree.map(copy, factors, axes)


def summed(copied: Any, axes: Any) -> Any:
    """The sum over the groups, placed as the factors are kept."""

    def total(x: jax.Array, axis: Any) -> jax.Array:
        mesh = ambient()
        if mesh is None:
            return x[0]
        return constrain(x.sum(0), kept(axis, x.shape[1:], mesh))

    return jax.tree.map(total, copied, axes)


def divided(batch: Any, parts: int = 1) -> Any:
    """Rows to groups: (rows, …) to (parts, groups, rows of a part, …)."""
    count, names = _present()

    def divide(x: jax.Array) -> jax.Array:
        x = x.reshape(count, parts, -1, *x.shape[1:]).swapaxes(0, 1)
        return constrain(x, P(None, names)) if names else x

    return jax.tree.map(divide, batch)


def each_group(f: Callable[..., Any]) -> Callable[..., Any]:
    """`f(factors, frozen, *rows)` for every group at once.

    The factors and the rows have an axis of groups in front, from `copies` and
    `divided`; so have the results.
    """

    def all_groups(copied: Any, frozen: Any, *rows: Any) -> Any:
        count, names = _present()
        if count == 1:  # the same program as without a mesh
            first = jax.tree.map(lambda x: x[0], (copied, rows))
            out = f(first[0], frozen, *first[1])
            return jax.tree.map(lambda x: x[None], out)
        over = (0, None, *(0 for _ in rows))
        return jax.vmap(f, over, spmd_axis_name=names)(copied, frozen, *rows)

    return all_groups
