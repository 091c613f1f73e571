"""Optax's optimisers by name."""

import inspect
from collections.abc import Callable

import optax

from manifold_lora.errors import InputError, nearest

Inner = Callable[[optax.ScalarOrSchedule], optax.GradientTransformation]


def named_optimizer(name: str, weight_decay: float = 0.0) -> Inner:
    """The Optax optimiser of that name, as a function of its learning rate.

    Args:
        name: of a function of `optax` whose first argument is the learning rate.
        weight_decay: decoupled; 0 as well is passed on, where Optax's default is not.

    Raises:
        InputError: Optax has none of that name, or it takes no weight decay.

    Examples:
        >>> tx = named_optimizer("lion", weight_decay=0.1)(1e-3)
    """
    known = {}
    for candidate in dir(optax):
        factory = getattr(optax, candidate)
        if inspect.isfunction(factory):
            parameters = list(inspect.signature(factory).parameters)
            if parameters[:1] == ["learning_rate"]:
                known[candidate] = (factory, parameters)
    if name not in known:
        raise InputError(f"Optax has no optimiser {name!r}. {nearest(name, known)}")
    factory, parameters = known[name]
    options = {"weight_decay": weight_decay} if "weight_decay" in parameters else {}
    if weight_decay and not options:
        raise InputError(
            f"--optimizer {name} takes no weight decay, got --weight-decay "
            f"{weight_decay}: leave it out, or use adamw."
        )
    return lambda rate: factory(rate, **options)
