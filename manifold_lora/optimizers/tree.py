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
    """Call f(manifold, point, *vectors) for every point of the parameters."""

    def each(manifold: Manifold, *subtrees: Any) -> Any:
        return jax.tree.map(lambda *leaves: f(manifold, *leaves), *subtrees)

    return jax.tree.map(each, manifolds, params, *rest, is_leaf=is_manifold)


def check_points(manifolds: Any, params: Any) -> None:
    """Raise one `InputError` for every point that its manifold cannot hold.

    Shapes are always checked; the distance from the manifold only for concrete
    arrays of this process, not for tracers, abstract shapes or placeholders.
    """
    points = []
    try:
        jax.tree_util.tree_map_with_path(
            lambda path, manifold, subtree: jax.tree_util.tree_map_with_path(
                lambda below, x: points.append((path + below, manifold, x)), subtree
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
        if problem := _problem(manifold, x):
            name = jax.tree_util.keystr(path) or "the parameter"
            problems.append(f"{name}: {problem}")
    if problems:
        raise InputError("\n".join(problems))


def _problem(manifold: Any, x: Any) -> str | None:
    """Why x cannot be a point of the manifold, or None."""
    if not is_manifold(manifold):
        return (
            f"{manifold!r} is no manifold. Give an instance such as Stiefel() or "
            "Euclidean()."
        )
    try:
        manifold.check_shape(tuple(np.shape(x)))
    except InputError as error:
        return str(error)
    if isinstance(manifold, Euclidean) or isinstance(x, Tracer):
        return None
    if not isinstance(x, jax.Array | np.ndarray):
        return None
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return None
    with jax.ensure_compile_time_eval():  # a constant may be met under jit, too
        distance = float(manifold.residual(x).max(initial=0))
    if not distance <= _ON_MANIFOLD.get(x.dtype.name, 3e-2):
        return (
            f"the point is {distance:.2g} off {manifold}. Start from "
            "random_point(key, shape), or repair it with nearest_point(x)."
        )
    return None
