"""What every optimiser checks of its numbers, parameters, gradients and states."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import keystr, tree_leaves_with_path

from manifold_lora.errors import InputError
from manifold_lora.manifolds import Euclidean, Manifold
from manifold_lora.optimizers.tree import Manifolds, map_points, resolve

_NOT_NEGATIVE = ("learning_rate", "free_learning_rate", "eps", "weight_decay")
_FUNCTIONS = ("inner",)


def check_hyperparameters(owner: str, **values: Any) -> None:
    """Raise one `InputError` for all numbers that are out of range.

    Rates, ε and weight decay must be ≥ 0 and finite, β in [0, 1). Only Python numbers
    are checked, not schedules, nor arrays such as those of `inject_hyperparams`.
    """
    problems = []
    for name, value in values.items():
        if name in _FUNCTIONS:
            if value is not None and not callable(value):
                problems.append(
                    f"{name} as a function of the learning rate, such as optax.sgd, "
                    f"got {type(value).__name__} (with optax.inject_hyperparams, "
                    f'static_args=("{name}",))'
                )
        elif not isinstance(value, int | float | np.number):
            continue
        elif name in _NOT_NEGATIVE and not 0 <= value < math.inf:
            problems.append(f"{name} ≥ 0 and finite, got {value}")
        elif name not in _NOT_NEGATIVE and not 0 <= value < 1:
            problems.append(f"0 ≤ {name} < 1, got {value}")
    if problems:
        raise InputError(f"{owner} needs {'; '.join(problems)}.")


def checked(
    owner: str,
    tx: optax.GradientTransformation,
    manifolds: Manifolds = Euclidean(),  # noqa: B008, frozen
    check_params: Callable[[Any], None] = lambda params: None,
) -> optax.GradientTransformationExtraArgs:
    """The transformation with checks of everything that it is called with.

    `update` raises without parameters, for gradients of other shapes, and for a state
    that belongs to other parameters: all while tracing, at no cost in a compiled
    step. Points in float16, where Adam's ε is 0, are computed in float32, with their
    moments, and rounded to float16 at the end.
    """
    inner = optax.with_extra_args_support(tx)

    def wide(tree: Any, params: Any) -> Any:
        return map_points(_widened, resolve(manifolds, params), params, tree)

    def init(params: optax.Params) -> optax.OptState:
        check_params(params)
        if not _has_float16(params):
            return inner.init(params)
        return inner.init(wide(params, params))

    def update(updates, state, params=None, **extra_args):
        _check_gradients(owner, updates, params)
        narrow = params
        if _has_float16(params):
            updates, params = (wide(tree, params) for tree in (updates, params))
        try:
            updates, new = inner.update(updates, state, params, **extra_args)
        except (ValueError, TypeError, AttributeError) as error:
            if isinstance(error, InputError) or _fits(inner, params, state):
                raise
            raise _other_state(owner) from error
        if _shapes(new) != _shapes(state):  # it was broadcast
            raise _other_state(owner)
        if params is not narrow:
            updates = jax.tree.map(_rounded, narrow, params, updates)
        return updates, new

    return optax.GradientTransformationExtraArgs(init, update)


def _check_gradients(owner: str, updates: Any, params: Any) -> None:
    """Raise unless there are parameters, and the gradients have their shapes."""
    if params is None:
        raise ValueError(
            f"{owner} needs the parameters: call update(grads, state, params)."
        )
    try:
        jax.tree.map(lambda *_: None, params, updates)
    except (ValueError, TypeError) as error:
        raise InputError(
            f"{owner} got gradients and parameters of different structures.\n"
            f"  gradients:  {jax.tree.structure(updates)}\n"
            f"  parameters: {jax.tree.structure(params)}\n"
            "Give both in the same containers. nnx.to_pure_dict turns the nnx.State "
            "of nnx.grad into the nested dict that ml.factors returns."
        ) from error
    pairs = zip(tree_leaves_with_path(params), jax.tree.leaves(updates), strict=False)
    problems = [
        f"{keystr(path) or 'the parameter'}: {np.shape(g)} for {np.shape(x)}"
        for (path, x), g in pairs
        if np.shape(g) != np.shape(x)
    ]
    if problems:
        raise InputError(
            f"{owner} got gradients of other shapes than the parameters: "
            f"{'; '.join(problems)}. Take them with respect to these parameters."
        )


def _fits(tx: optax.GradientTransformation, params: Any, state: Any) -> bool:
    """True if the state is one that `init` makes for these parameters."""
    return _shapes(jax.eval_shape(tx.init, params)) == _shapes(state)


def _shapes(tree: Any) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    return structure, [np.shape(x) for x in leaves]


def _other_state(owner: str) -> InputError:
    return InputError(
        f"{owner} got a state of other parameters: call init(params) of this "
        "optimiser with the parameters that update gets, or restore its checkpoint."
    )


def _has_float16(tree: Any) -> bool:
    return any(getattr(x, "dtype", None) == jnp.float16 for x in jax.tree.leaves(tree))


def _widened(manifold: Manifold, x: Any, leaf: Any) -> Any:
    """The leaves of constrained points, in float32 where they are float16."""
    del x
    if isinstance(manifold, Euclidean):
        return leaf
    return jax.tree.map(
        lambda a: a.astype(jnp.float32) if a.dtype == jnp.float16 else a, leaf
    )


def _rounded(x: Any, wide: Any, u: Any) -> Any:
    """The additive update of a float16 leaf, from that of its float32 copy."""
    return u if x.dtype == wide.dtype else (wide + u).astype(x.dtype) - x
