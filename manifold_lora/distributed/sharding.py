"""Which axis of an array is on which axis of the mesh: one table, `RULES`.

Parameters carry the names of their axes as metadata, `nnx.Param(x, axes=("layers",
"embed", "heads"))`. Everything that follows a parameter, such as its moments, is
placed by the same names.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import P
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding

from manifold_lora.distributed.mesh import GROUPS

Axes = Sequence[str | None]


class Rule(NamedTuple):
    """The axes of the mesh that an axis of an array is divided over."""

    kept: tuple[str, ...] = ()  # in memory
    used: tuple[str, ...] = ()  # while a layer computes; what is missing is gathered


RULES = {
    "batch": Rule(GROUPS, GROUPS),
    "embed": Rule(("fsdp",)),
    "heads": Rule(("tensor",), ("tensor",)),  # heads × head_dim, folded
    "mlp": Rule(("tensor",), ("tensor",)),
    "vocab": Rule(("tensor",), ("tensor",)),
    "layers": Rule(),
    "rank": Rule(),
}
# Rows of a factor, beside its rank, are kept on all that is left: the geometry then
# exchanges r×r sums, and every device moves a part.
_FACTORS = ("fsdp", "tensor")


def kept(axes: Axes, shape: Sequence[int], mesh: Mesh | AbstractMesh) -> P:
    """How an array with these names is kept in memory.

    An axis that the mesh does not divide is left whole.

    >>> mesh = AbstractMesh((2, 4), ("fsdp", "tensor"))
    >>> spec = kept(("layers", "heads", "rank"), (3, 64, 8), mesh)
    >>> spec == P(None, ("tensor", "fsdp"), None)
    True
    """
    places = [RULES[name].kept if name else () for name in axes]
    if "rank" in axes:
        for place, name in enumerate(axes):
            if name not in (None, "rank", "layers"):
                used = RULES[name].used
                places[place] = used + tuple(a for a in _FACTORS if a not in used)
    return _fitted(places, shape, mesh)


def used(axes: Axes, shape: Sequence[int], mesh: Mesh | AbstractMesh) -> P:
    """How an array with these names is while a layer computes with it."""
    return _fitted([RULES[n].used if n else () for n in axes], shape, mesh)


def _fitted(
    places: Sequence[tuple[str, ...]], shape: Sequence[int], mesh: Mesh | AbstractMesh
) -> P:
    """The places as far as the mesh has such axes and they divide the shape."""
    spec: list[str | tuple[str, ...] | None] = []
    for place, size in zip(places, shape, strict=True):
        there = tuple(a for a in place if mesh.shape.get(a, 1) > 1)
        while there and size % math.prod(mesh.shape[a] for a in there):
            there = there[:-1]
        spec.append(there[0] if len(there) == 1 else there or None)
    return P(*spec)


def ambient() -> AbstractMesh | None:
    """The mesh of `jax.set_mesh`, if it has more than one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def constrain(x: jax.Array, spec: P) -> jax.Array:
    """The array placed so on the ambient mesh, inside a compiled function.

    One word for two dialects: a constraint where axes are `Auto`, a change of the
    type where they are `Explicit`.
    """
    mesh = ambient()
    if mesh is None:
        return x
    if AxisType.Explicit in mesh.axis_types:
        return jax.reshard(x, spec)
    return jax.lax.with_sharding_constraint(x, spec)


def use(x: jax.Array, axes: Axes) -> jax.Array:
    """A parameter as a layer computes with it: gathered over fsdp."""
    mesh = ambient()
    return x if mesh is None else constrain(x, used(axes, x.shape, mesh))


def axes_of(state: Any) -> Any:
    """The names of every variable's axes in place of the variable."""
    return jax.tree.map(
        lambda variable: names(variable),
        state,
        is_leaf=lambda node: isinstance(node, nnx.Variable),
    )


def names(variable: Any) -> Axes:
    """The names of a variable's axes; None for all where it carries none."""
    found = variable.get_metadata().get("axes")
    return found or (None,) * len(variable.shape)


def follow(tree: Any, params: Any, axes: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Specs for a tree that holds copies of the parameters' tree, such as moments.

    A leaf whose path ends with that of a parameter is placed as it is, as far as the
    shapes agree: second moments of a row have one column. All others are replicated.

    Args:
        tree: of arrays or shapes.
        params: nested dict of arrays or shapes.
        axes: of the same structure, with the names of the axes as leaves.
        mesh: that they are to be placed on.
    """
    known = {}
    leaves = jax.tree_util.tree_leaves_with_path(params)
    every = jax.tree.leaves(axes, is_leaf=lambda node: isinstance(node, tuple))
    for (path, leaf), axis in zip(leaves, every, strict=True):
        known[_keys(path)] = (leaf.shape, axis)
    lengths = {len(path) for path in known}

    def spec(path: Any, leaf: Any) -> P:
        keys = _keys(path)
        shape = jnp.shape(leaf)
        for length in lengths:
            there, axis = known.get(keys[-length:], ((), ()))
            if axis and len(there) == len(shape):
                same = zip(kept(axis, there, mesh), there, shape, strict=True)
                return P(*(place if n == m else None for place, n, m in same))
        return P()

    return jax.tree_util.tree_map_with_path(spec, tree)


def _keys(path: Any) -> tuple[Any, ...]:
    return tuple(getattr(key, "key", getattr(key, "name", key)) for key in path)


def shardings(specs: Any, mesh: Mesh | AbstractMesh) -> Any:
    """The specs as shardings on the mesh."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        specs,
        is_leaf=lambda node: isinstance(node, P),
    )


def keep(tree: Any, params: Any, axes: Any) -> Any:
    """A tree that holds the parameters' tree, or copies of it, placed to be kept.

    Inside a compiled function; see `follow`.
    """
    mesh = ambient()
    if mesh is None:
        return tree
    specs = follow(tree, params, axes, mesh)
    return jax.tree.map(constrain, tree, specs)


def placed(params: Any, axes: Any) -> Any:
    """Specs of the parameters as they are kept on the ambient mesh."""
    mesh = ambient()
    if mesh is None:
        return P()
    return jax.tree.map(lambda x, a: kept(a, x.shape, mesh), params, axes)


def automatic(f: Callable[..., Any], results: Any = None) -> Callable[..., Any]:
    """The function f, partitioned by the compiler whatever the types of the mesh.

    It is f itself where the axes of the ambient mesh are `Auto`. Where they are
    `Explicit`, `results` are the specs that its results have; by default they are
    replicated.
    """
    mesh = ambient()
    if mesh is None or AxisType.Explicit not in mesh.axis_types:
        return f
    return jax.sharding.auto_axes(f, out_sharding=P() if results is None else results)
