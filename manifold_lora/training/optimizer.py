"""From a configuration to one Optax transformation."""

import inspect
from collections.abc import Callable
from typing import Any

import optax

from manifold_lora.errors import InputError, nearest
from manifold_lora.optimizers import stiefel_lora
from manifold_lora.training.config import ResolvedConfig

Inner = Callable[[optax.ScalarOrSchedule], optax.GradientTransformation]


def build_schedule(config: ResolvedConfig, peak: float, steps: int) -> optax.Schedule:
    """From 0 to the peak in the warm-up, then linear, cosine or constant to the end."""
    warmup = min(config.warmup_steps, steps - 1)
    rest = steps - warmup
    after = {
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
        "constant": optax.constant_schedule(peak),
    }[config.schedule]
    if warmup == 0:
        return after
    # The first step already moves: rate 1/(warmup + 1), not 0.
    rising = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules([rising, after], [warmup])


def named_optimizer(name: str, weight_decay: float) -> Inner:
    """The Optax optimiser of that name as a function of its learning rate.

    Raises:
        InputError: Optax has none of that name, or it takes no weight decay.
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


def build_optimizer(
    config: ResolvedConfig, manifolds: Any, steps: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Clipping and the method's recipe, and the schedule of its main learning rate."""
    inner = named_optimizer(config.optimizer, config.weight_decay)
    rate = build_schedule(config, config.learning_rate, steps)
    free_rate = build_schedule(config, config.free_learning_rate, steps)
    recipe = {
        "lora": lambda: inner(rate),
        "stiefel": lambda: stiefel_lora(
            rate, manifolds, free_learning_rate=free_rate, inner=inner
        ),
    }[config.method]()
    clip = [optax.clip_by_global_norm(config.clip)] if config.clip else []
    return optax.chain(*clip, recipe), rate
