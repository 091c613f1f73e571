"""Logical axes to mesh axes: one table, `RULES`, for storage and for compute.

Parameters name their logical axes as metadata, `nnx.Param(x, axes=("layers", "embed",
"heads"))`. Everything derived from a parameter, such as its gradient and its moments,
is sharded by the same names. The way of the parameters through a training step, with
the function behind each arrow and what the devices communicate:

    frozen kernel (layers, in, out)        trainable factor (layers, rows, r)
    storage_spec: fsdp × tensor            storage_spec: rows over fsdp × tensor
          │                                      │
          │ gather_for_compute, per layer        │ replicate_per_group, once per step
          │ all-gather over fsdp                 │ all-gather over fsdp
          ▼                                      ▼
    compute_spec: tensor                   compute_spec: tensor, a copy per group
          └──────────────────┬───────────────────┘
                             ▼
    vmap_over_groups: forward and backward pass of each micro-batch;
    activations are all-reduced over tensor
                             │
                             ▼
    gradients of the factors, one per group, accumulated over the micro-batches
                             │ sum_over_groups, once per step
                             │ all-reduce or reduce-scatter over data × fsdp
                             ▼
    gradients, moments and factors, all with storage_spec: the optimiser updates its
    shards and all-reduces r×r matrices only
                             │ constrain_to_storage
                             ▼
    factors and moments of the next step, storage_spec

A group is the devices that share rows of the batch; see `groups`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import P
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding

from manifold_lora.distributed.mesh import BATCH_AXES

Axes = Sequence[str | None]


class Rule(NamedTuple):
    """The mesh axes that a logical axis is sharded over."""

    storage: tuple[str, ...] = ()  # between layers and between steps
    compute: tuple[str, ...] = ()  # while a layer runs; the rest is all-gathered


RULES = {
    "batch": Rule(BATCH_AXES, BATCH_AXES),
    "embed": Rule(("fsdp",)),
    "heads": Rule(("tensor",), ("tensor",)),  # heads × head_dim, folded
    "mlp": Rule(("tensor",), ("tensor",)),
    "vocab": Rule(("tensor",), ("tensor",)),
    "layers": Rule(),
    "rank": Rule(),
}
# The rows of a factor are stored over all of these: the geometry then all-reduces r×r
# matrices only, and every device updates a shard.
_FACTOR_AXES = ("fsdp", "tensor")


def storage_spec(axes: Axes, shape: Sequence[int], mesh: Mesh | AbstractMesh) -> P:
    """The spec of an array between steps.

    An axis that the mesh does not divide evenly is replicated.

    Args:
        axes: logical axes, one for each dimension; None is replicated.
        shape: of the array.
        mesh: that it is sharded over.

    >>> mesh = AbstractMesh((2, 4), ("fsdp", "tensor"))
    >>> spec = storage_spec(("layers", "heads", "rank"), (3, 64, 8), mesh)
    >>> spec == P(None, ("tensor", "fsdp"), None)
    True
    """
    mesh_axes = [RULES[name].storage if name else () for name in axes]
    if "rank" in axes:
        for dimension, name in enumerate(axes):
            if name not in (None, "rank", "layers"):
                compute = RULES[name].compute
                rest = tuple(a for a in _FACTOR_AXES if a not in compute)
                mesh_axes[dimension] = compute + rest
    return _divisible(mesh_axes, shape, mesh)


def compute_spec(axes: Axes, shape: Sequence[int], mesh: Mesh | AbstractMesh) -> P:
    """The spec of an array while a layer computes with it; see `storage_spec`.

    >>> mesh = AbstractMesh((2, 4), ("fsdp", "tensor"))
    >>> spec = compute_spec(("layers", "embed", "heads"), (3, 32, 64), mesh)
    >>> spec == P(None, None, "tensor")
    True
    """
    return _divisible([RULES[n].compute if n else () for n in axes], shape, mesh)


def _divisible(
    mesh_axes: Sequence[tuple[str, ...]],
    shape: Sequence[int],
    mesh: Mesh | AbstractMesh,
) -> P:
    """The spec of those mesh axes that exist and divide the dimension."""
    spec: list[str | tuple[str, ...] | None] = []
    for candidates, size in zip(mesh_axes, shape, strict=True):
        axes = tuple(a for a in candidates if mesh.shape.get(a, 1) > 1)
        while axes and size % math.prod(mesh.shape[a] for a in axes):
            axes = axes[:-1]
        spec.append(axes[0] if len(axes) == 1 else axes or None)
    return P(*spec)


def ambient_mesh() -> AbstractMesh | None:
    """The mesh of `jax.set_mesh`, or None without one or with a single device."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def constrain(x: jax.Array, spec: P) -> jax.Array:
    """The array with that spec on the ambient mesh, inside a compiled function.

    A sharding constraint where the axes are `Auto`, a reshard where they are
    `Explicit`.
    """
    mesh = ambient_mesh()
    if mesh is None:
        return x
    if AxisType.Explicit in mesh.axis_types:
        return jax.reshard(x, spec)
    return jax.lax.with_sharding_constraint(x, spec)


def gather_for_compute(x: jax.Array, axes: Axes) -> jax.Array:
    """A parameter as a layer computes with it: all-gathered over fsdp."""
    mesh = ambient_mesh()
    return x if mesh is None else constrain(x, compute_spec(axes, x.shape, mesh))


def logical_axes(variable: Any) -> Axes:
    """The logical axes of a variable; None for each dimension if it names none."""
    axes = variable.get_metadata().get("axes")
    return axes or (None,) * len(variable.shape)


def logical_axes_tree(state: Any) -> Any:
    """The state with the logical axes of each variable in its place."""
    return jax.tree.map(
        logical_axes, state, is_leaf=lambda node: isinstance(node, nnx.Variable)
    )


def specs_like(tree: Any, params: Any, axes: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Storage specs of a tree that contains copies of the parameters, such as moments.

    A leaf whose path ends with that of a parameter gets the parameter's spec in those
    dimensions whose size is the same: a second moment per row has a single column.
    All other leaves are replicated.

    Args:
        tree: of arrays or shapes.
        params: nested dict of arrays or shapes.
        axes: logical axes, in the structure of `params`.
        mesh: that the tree is sharded over.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    axes_leaves = jax.tree.leaves(axes, is_leaf=lambda node: isinstance(node, tuple))
    by_path = {
        _keys(path): (leaf.shape, leaf_axes)
        for (path, leaf), leaf_axes in zip(leaves, axes_leaves, strict=True)
    }
    lengths = {len(path) for path in by_path}

    def spec(path: Any, leaf: Any) -> P:
        keys = _keys(path)
        shape = jnp.shape(leaf)
        for length in lengths:
            param_shape, param_axes = by_path.get(keys[-length:], ((), ()))
            if param_axes and len(param_shape) == len(shape):
                param_spec = storage_spec(param_axes, param_shape, mesh)
                dimensions = zip(param_spec, param_shape, shape, strict=True)
                return P(*(entry if n == m else None for entry, n, m in dimensions))
        return P()

    return jax.tree_util.tree_map_with_path(spec, tree)


def _keys(path: Any) -> tuple[Any, ...]:
    return tuple(getattr(key, "key", getattr(key, "name", key)) for key in path)


def named_shardings(specs: Any, mesh: Mesh) -> Any:
    """The specs as `NamedSharding`s on the mesh."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        specs,
        is_leaf=lambda node: isinstance(node, P),
    )


def constrain_to_storage(tree: Any, params: Any, axes: Any) -> Any:
    """The tree with the specs of `specs_like`, inside a compiled function."""
    mesh = ambient_mesh()
    if mesh is None:
        return tree
    specs = specs_like(tree, params, axes, mesh)
    return jax.tree.map(constrain, tree, specs)


def storage_specs(params: Any, axes: Any) -> Any:
    """The parameters' storage specs on the ambient mesh."""
    mesh = ambient_mesh()
    if mesh is None:
        return P()
    return jax.tree.map(lambda x, a: storage_spec(a, x.shape, mesh), params, axes)


def auto_partitioned(
    f: Callable[..., Any], out_specs: Any = None
) -> Callable[..., Any]:
    """The function f, partitioned by the compiler on any mesh.

    Where the axes of the ambient mesh are `Auto`, this is f itself. Where they are
    `Explicit`, the results get `out_specs`; by default they are replicated.
    """
    mesh = ambient_mesh()
    if mesh is None or AxisType.Explicit not in mesh.axis_types:
        return f
    replicated = P() if out_specs is None else out_specs
    return jax.sharding.auto_axes(f, out_sharding=replicated)
