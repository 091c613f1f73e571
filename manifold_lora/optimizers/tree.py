"""Prefix trees of manifolds: which point lives where."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from manifold_lora.errors import InputError
from manifold_lora.manifolds import Euclidean, Manifold

# A prefix tree of the parameters whose leaves are manifolds, or a function from
# the parameters to such a tree (it may look at structure and shapes only).
Manifolds = Any | Callable[[Any], Any]

# A float32 point further off than this was never put on its manifold; bfloat16
# storage alone is 4e-3 off.
_ON_MANIFOLD = {"float64": 1e-5, "float32": 1e-4}


def is_manifold(node: Any) -> bool:
    """True for a manifold: the leaves of a prefix tree."""
    return isinstance(node, Manifold)


def resolve(manifolds: Manifolds, params: Any) -> Any:
    """The prefix tree itself, where a function of the parameters was given."""
    if not jax.tree.leaves(params):  # such as the placeholder of optax's map_params
        return Euclidean()
    if callable(manifolds) and not is_manifold(manifolds):
        return manifolds(params)
    return manifolds


def map_points(f: Callable[..., Any], manifolds: Any, params: Any, *rest: Any) -> Any:
    """Call f(manifold, point, *vectors) for every point of the parameters.

    Points whose leaves are masked out of one of the trees, as inside
    `optax.partition`, are left as the last tree has them.
    """

    def each(manifold: Manifold, *subtrees: Any) -> Any:
        def one(*nodes: Any) -> Any:
            if not all(jax.tree.leaves(node) for node in nodes):
                return nodes[-1]
            return f(manifold, *nodes)

        return jax.tree.map(one, *subtrees, is_leaf=manifold.is_point)

    return jax.tree.map(each, manifolds, params, *rest, is_leaf=is_manifold)


def map_together(
    f: Callable[..., list[Any]], manifolds: Any, params: Any, *rest: Any
) -> Any:
    """Call f(manifold, points, *lists of vectors) once for each distinct manifold.

    Like `map_points`, but all points of one manifold come together, so that their
    small matrices can be worked on in one call.
    """
    calls: dict[Manifold, list[tuple]] = {}

    def collect(manifold: Manifold, *nodes: Any) -> int:
        group = calls.setdefault(manifold, [])
        group.append(nodes)
        return len(group) - 1

    places = map_points(collect, manifolds, params, *rest)
    results = {
        m: f(m, *map(list, zip(*nodes, strict=True))) for m, nodes in calls.items()
    }

    def pick(manifold: Manifold, place: Any) -> Any:
        return results[manifold][place]

    return jax.tree.map(
        lambda m, below: jax.tree.map(lambda place: pick(m, place), below),
        manifolds,
        places,
        is_leaf=is_manifold,
    )


def check_points(manifolds: Any, params: Any, within: float = 0.0) -> None:
    """Raise one `InputError` for every point that its manifold cannot hold.

    Shapes are always checked; the distance from the manifold only for concrete
    arrays of this process, not for tracers, abstract shapes or placeholders. It
    may be as large as `within`, and as the rounding of the dtype in any case.
    """
    points = []
    try:
        jax.tree_util.tree_map_with_path(
            lambda path, manifold, subtree: jax.tree_util.tree_map_with_path(
                lambda below, x: points.append((path + below, manifold, x)),
                subtree,
                is_leaf=manifold.is_point if is_manifold(manifold) else None,
            ),
            manifolds,
            params,
            is_leaf=is_manifold,
        )
    except (ValueError, TypeError) as error:
        shown = jax.tree.map(str, manifolds, is_leaf=is_manifold)
        raise InputError(
            "The tree of manifolds is no prefix of the parameters.\n"
            f"  manifolds:  {shown}\n"
            f"  parameters: {jax.tree.structure(params)}\n  {error}"
        ) from error
    problems = []
    for path, manifold, x in points:
        if problem := _problem(manifold, x, within):
            name = jax.tree_util.keystr(path) or "the parameter"
            problems.append(f"{name}: {problem}")
    if problems:
        raise InputError("\n".join(problems))


def _problem(manifold: Any, x: Any, within: float) -> str | None:
    """Why x cannot be a point of the manifold, or None."""
    if not is_manifold(manifold):
        return (
            f"{manifold!r} is no manifold. Give an instance such as Stiefel() or "
            "Euclidean()."
        )
    leaves = jax.tree.leaves(x)
    if manifold.is_point(x):
        if len(leaves) < len(manifold.parts):  # masked out by optax.partition
            return None
        shape = {k: tuple(np.shape(x[k])) for k in manifold.parts}
    elif manifold.parts:
        return (
            f"{manifold} needs a dict of {', '.join(manifold.parts)}, got an array of "
            f"shape {np.shape(x)}. Place it on the sub-tree that holds them."
        )
    else:
        shape = tuple(np.shape(x))
    try:
        manifold.check_shape(shape)
    except InputError as error:
        return str(error)
    if isinstance(manifold, Euclidean) or not all(map(_is_known, leaves)):
        return None
    with jax.ensure_compile_time_eval():  # a constant may be met under jit, too
        distance = float(manifold.residual(x).max(initial=0))
    rounding = max(_ON_MANIFOLD.get(leaf.dtype.name, 3e-2) for leaf in leaves)
    if not distance <= max(within, rounding):
        return (
            f"the point is {distance:.2g} off {manifold}. Start from "
            "random_point(key, shape), or repair it with nearest_point(x)."
        )
    return None


def _is_known(x: Any) -> bool:
    """True for an array whose values this process can read now."""
    if isinstance(x, Tracer) or not isinstance(x, jax.Array | np.ndarray):
        return False
    return not isinstance(x, jax.Array) or x.is_fully_addressable
