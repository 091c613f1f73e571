"""Data parallelism over groups of devices, each with its own rows of the batch.

A group is the devices that share rows of the batch: those with one index on the data
and fsdp axes. Each group computes with its own copy of the factors, all-gathered once
per step, and accumulates its own gradients, summed over the groups once per step, so
that the factors cost no collectives per layer or per micro-batch.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import P

from manifold_lora.distributed.mesh import BATCH_AXES, group_count
from manifold_lora.distributed.sharding import (
    ambient_mesh,
    compute_spec,
    constrain,
    storage_spec,
)


def _groups() -> tuple[int, tuple[str, ...]]:
    """The number of groups on the ambient mesh, and the mesh axes they differ in."""
    mesh = ambient_mesh()
    if mesh is None:
        return 1, ()
    return group_count(mesh.shape), tuple(a for a in BATCH_AXES if a in mesh.shape)


def replicate_per_group(factors: Any, axes: Any) -> Any:
    """One copy of the factors for each group: (…) to (groups, …)."""
    count, mesh_axes = _groups()

    def replicate(x: jax.Array, logical: Any) -> jax.Array:
        mesh = ambient_mesh()
        if mesh is None:
            return x[None]
        spec = compute_spec(logical, x.shape, mesh)
        x = jnp.broadcast_to(constrain(x, spec), (count, *x.shape))
        return constrain(x, P(mesh_axes, *spec))

    return jax.tree.map(replicate, factors, axes)


def sum_over_groups(tree: Any, axes: Any) -> Any:
    """The sum over the leading group axis, (groups, …) to (…), sharded as in storage.

    Args:
        tree: of gradients, one for each group.
        axes: logical axes of the factors.
    """

    def total(x: jax.Array, logical: Any) -> jax.Array:
        mesh = ambient_mesh()
        if mesh is None:
            return x[0]
        return constrain(x.sum(0), storage_spec(logical, x.shape[1:], mesh))

    return jax.tree.map(total, tree, axes)


def split_batch(batch: Any, micro_batches: int = 1) -> Any:
    """Rows to groups, (rows, …) to (micro-batches, groups, rows per group, …)."""
    count, mesh_axes = _groups()

    def split(x: jax.Array) -> jax.Array:
        x = x.reshape(count, micro_batches, -1, *x.shape[1:]).swapaxes(0, 1)
        return constrain(x, P(None, mesh_axes)) if mesh_axes else x

    return jax.tree.map(split, batch)


def vmap_over_groups(f: Callable[..., Any]) -> Callable[..., Any]:
    """`f(factors, frozen, *rows)` vectorised over the groups.

    The factors, the rows and the results have a leading group axis, as from
    `replicate_per_group` and `split_batch`; the frozen weights have none.
    """

    def vectorised(factors: Any, frozen: Any, *rows: Any) -> Any:
        count, mesh_axes = _groups()
        if count == 1:  # the same program as without a mesh
            factors, rows = jax.tree.map(lambda x: x[0], (factors, rows))
            return jax.tree.map(lambda x: x[None], f(factors, frozen, *rows))
        in_axes = (0, None, *(0 for _ in rows))
        return jax.vmap(f, in_axes, spmd_axis_name=mesh_axes)(factors, frozen, *rows)

    return vectorised
