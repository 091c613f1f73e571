"""The first moments within the state of any Optax optimiser."""

from collections.abc import Callable
from typing import Any

import jax

# The fields in which Optax keeps running means of gradients or displacements. The
# second moments (nu, v, n, …) are not tangent vectors and must not be transported.
NAMES = ("mu", "trace", "m", "m1", "m2", "ema")


def replace(f: Callable[[Any], Any], state: Any) -> Any:
    """The state with f(moment) in place of every first moment, however nested."""
    if hasattr(state, "_fields"):
        return state._replace(
            **{
                name: f(value)
                if name in NAMES and jax.tree.leaves(value)
                else replace(f, value)
                for name, value in state._asdict().items()
            }
        )
    if isinstance(state, dict):
        return {key: replace(f, value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(replace(f, value) for value in state)
    return state


def has_any(state: Any) -> bool:
    """True if the state holds a first moment."""
    moments = []
    replace(moments.append, state)
    return bool(moments)
