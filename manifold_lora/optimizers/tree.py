"""Prefix trees of the parameters, such as the manifold of every point."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.tree_util import (
    DictKey,
    FlattenedIndexKey,
    GetAttrKey,
    tree_flatten_with_path,
    tree_leaves_with_path,
    tree_map_with_path,
)

from manifold_lora.errors import InputError
from manifold_lora.manifolds import Euclidean, Manifold

# A prefix tree of the parameters whose leaves are manifolds, or a function from
# the parameters to such a tree (it may look at structure and shapes only).
Manifolds = Any | Callable[[Any], Any]

# A larger constraint violation is not one of rounding; bfloat16 storage alone has
# 4e-3.
_ROUNDING = {"float64": 1e-5, "float32": 1e-4}


def is_manifold(node: Any) -> bool:
    """True for a manifold: the leaves of a prefix tree."""
    return isinstance(node, Manifold)


def resolve(manifolds: Manifolds, params: Any) -> Any:
    """The prefix tree of manifolds for these parameters."""
    if not jax.tree.leaves(params):  # such as the placeholder of optax's map_params
        return Euclidean()
    if callable(manifolds) and not is_manifold(manifolds):
        manifolds = manifolds(params)
    return with_containers_of(params, manifolds)


def with_containers_of(params: Any, prefix: Any) -> Any:
    """The prefix tree with its dicts as the mappings that the parameters have there.

    So a nested dict of manifolds also fits an `nnx.State`.
    """
    if not (isinstance(prefix, dict) and isinstance(params, Mapping)):
        return prefix
    children, structure = tree_flatten_with_path(params, lambda x: x is not params)
    keys = [path[0].key for path, _ in children if isinstance(path[0], DictKey)]
    if len(keys) < len(children) or set(keys) != set(prefix):
        return prefix
    pairs = zip(keys, children, strict=True)
    return structure.unflatten(
        with_containers_of(child, prefix[key]) for key, (_, child) in pairs
    )


def flatten_prefix(
    what: str, prefix: Any, params: Any, is_leaf: Callable[[Any], bool]
) -> list[tuple[tuple, Any, Any]]:
    """The path, the leaf and the sub-tree of parameters of every leaf of the prefix.

    Raises:
        InputError: if the tree is not a prefix; `what` says what it is a tree of.
    """
    entries = []
    try:
        tree_map_with_path(
            lambda *entry: entries.append(entry), prefix, params, is_leaf=is_leaf
        )
    except (ValueError, TypeError) as error:
        shown = jax.tree.map(str, prefix, is_leaf=is_leaf)
        raise InputError(
            f"The tree of {what} is not a prefix of the parameters.\n"
            f"  {what}: {shown}\n"
            f"  parameters: {jax.tree.structure(params)}\n  {error}"
        ) from error
    return entries


def map_points(f: Callable[..., Any], manifolds: Any, params: Any, *rest: Any) -> Any:
    """Call f(manifold, point, *vectors) for every point of the parameters.

    Coupled factors reach f as dicts of arrays, whatever their containers, and a dict
    that f returns gets the containers of the last tree. Points whose leaves are
    masked out of one of the trees, as inside `optax.partition`, are left as the last
    tree has them.
    """

    def each(manifold: Manifold, *subtrees: Any) -> Any:
        def one(*nodes: Any) -> Any:
            if not all(jax.tree.leaves(node) for node in nodes):
                return nodes[-1]
            if not manifold.is_point(nodes[0]):
                return f(manifold, *nodes)
            result = f(manifold, *(_as_dict(manifold, node) for node in nodes))
            if not isinstance(result, dict):
                return result
            return jax.tree.structure(nodes[-1]).unflatten(jax.tree.leaves(result))

        return jax.tree.map(one, *subtrees, is_leaf=manifold.is_point)

    return jax.tree.map(each, manifolds, params, *rest, is_leaf=is_manifold)


def _as_dict(manifold: Manifold, node: Any) -> dict[str, Any]:
    """A point of several parts as a dict of arrays; mappings flatten in key order."""
    return dict(zip(sorted(manifold.parts), jax.tree.leaves(node), strict=True))


def map_together(
    f: Callable[..., list[Any]], manifolds: Any, params: Any, *rest: Any
) -> Any:
    """Call f(manifold, points, *lists of vectors) once for each distinct manifold.

    Like `map_points`, but all points of one manifold come together, so that their
    small matrices can be worked on in one call.
    """
    calls: dict[Manifold, list[tuple]] = {}

    def collect(manifold: Manifold, *nodes: Any) -> None:
        calls.setdefault(manifold, []).append(nodes)

    map_points(collect, manifolds, params, *rest)
    results = {
        m: iter(f(m, *map(list, zip(*nodes, strict=True))))
        for m, nodes in calls.items()
    }
    return map_points(lambda m, *_: next(results[m]), manifolds, params, *rest)


def check_points(manifolds: Any, params: Any, within: float = 0.0) -> None:
    """Raise one `InputError` that names every leaf that is not a point.

    Shapes are always checked; the constraint violation only for concrete arrays of
    this process, not for tracers, abstract shapes or placeholders. It may be as
    large as `within`, and as the rounding of the dtype in any case.
    """
    problems = []
    for path, manifold, subtree in flatten_prefix(
        "manifolds", manifolds, params, is_manifold
    ):
        is_point = manifold.is_point if is_manifold(manifold) else None
        for below, x in tree_leaves_with_path(subtree, is_leaf=is_point):
            if problem := _problem(manifold, x, within):
                name = jax.tree_util.keystr(path + below) or "the parameter"
                problems.append(f"{name}: {problem}")
    if problems:
        raise InputError("\n".join(problems))


def _problem(manifold: Any, x: Any, within: float) -> str | None:
    """Why x is not a point of the manifold, or None."""
    if not is_manifold(manifold):
        return (
            f"{manifold!r} is not a manifold. Give an instance such as Stiefel() or "
            "Euclidean()."
        )
    leaves = jax.tree.leaves(x)
    if manifold.is_point(x) and len(leaves) <= len(manifold.parts):
        if len(leaves) < len(manifold.parts):  # masked out by optax.partition
            return None
        x = _as_dict(manifold, x)
        shape = {k: tuple(np.shape(x[k])) for k in manifold.parts}
    elif manifold.parts:
        return (
            f"{manifold} needs a dict of {', '.join(manifold.parts)}, got an array of "
            f"shape {np.shape(x)}. Put it on the sub-tree that holds them."
        )
    else:
        shape = tuple(np.shape(x))
    try:
        manifold.check_shape(shape)
    except InputError as error:
        return str(error)
    if isinstance(manifold, Euclidean):
        return None
    for leaf in leaves:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return (
                f"{manifold} needs real floating-point numbers, got {leaf.dtype.name}. "
                "Convert the parameter with .astype(jnp.float32)."
            )
    if not all(map(_is_concrete, leaves)):
        return None
    with jax.ensure_compile_time_eval():  # x may be a constant under jit
        violation = float(manifold.residual(x).max(initial=0))
    rounding = max(_ROUNDING.get(leaf.dtype.name, 3e-2) for leaf in leaves)
    if not violation <= max(within, rounding):
        return (
            f"the point has a constraint violation of {violation:.2g} on {manifold}. "
            "Initialise it with random_point(key, shape), or repair it with "
            "nearest_point(x)."
        )
    return None


def leaf_name(tree: Any, path: tuple) -> str:
    """The path of a leaf of the tree, such as "layers/0/attn/lora_a".

    An `nnx.State` holds variables at `init` and arrays at `update`: the ".value" of a
    variable is left out.
    """
    if path and path[-1] == GetAttrKey("value"):
        path = path[:-1]
    parts: list[Any] = []
    for key in path:
        part = getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))
        if isinstance(key, FlattenedIndexKey) and hasattr(tree, "paths"):
            part = tree.paths[part]  # an nnx.FlatState counts its leaves
        parts.extend(part if isinstance(part, tuple) else [part])
    return "/".join(map(str, parts))


def _is_concrete(x: Any) -> bool:
    """True for an array whose values this process can read."""
    if isinstance(x, Tracer) or not isinstance(x, jax.Array | np.ndarray):
        return False
    return not isinstance(x, jax.Array) or x.is_fully_addressable
