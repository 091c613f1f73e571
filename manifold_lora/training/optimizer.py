"""From a configuration to one Optax transformation."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from manifold_lora.errors import InputError, nearest
from manifold_lora.methods import METHODS
from manifold_lora.optimizers import (
    FactorSpec,
    landing_adamw,
    lora_plus,
    loram,
    stella,
    stiefel_lora,
)
from manifold_lora.training.config import ResolvedConfig

Inner = Callable[[optax.ScalarOrSchedule], optax.GradientTransformation]


class Rates(NamedTuple):
    """Peaks of the learning rates: numbers, or traced ones."""

    constrained: Any  # of all factors, where there is no second rate
    free: Any = None


def build_schedule(config: ResolvedConfig, peak: Any, steps: Any) -> optax.Schedule:
    """From 0 to the peak in the warm-up, then linear, cosine or constant to the end.

    The peak and the number of steps may be traced, so that one compiled step serves
    runs of any rate and length.
    """
    warmup = jnp.minimum(config.warmup_steps, steps - 1)

    def schedule(count: Any) -> Any:
        # The first step already moves: rate 1/(warmup + 1), not 0.
        rising = peak * (count + 1) / (warmup + 1)
        done = jnp.clip((count - warmup) / (steps - warmup), 0, 1)
        after = {
            "linear": 1 - done,
            "cosine": (1 + jnp.cos(jnp.pi * done)) / 2,
            "constant": jnp.ones_like(done),
        }[config.schedule]
        return jnp.where(count < warmup, rising, peak * after)

    return schedule


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
    config: ResolvedConfig,
    manifolds: Any,
    steps: Any,
    hidden_size: int,
    rates: Rates | None = None,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Clipping and the method's recipe, and the schedule of its main learning rate.

    Args:
        config: of the run.
        manifolds: prefix tree of the factors.
        steps: of the whole run, which the schedule needs; may be traced.
        hidden_size: the model's width, for StelLA's scale.
        rates: other peaks than the config's; may be traced.
    """
    rates = rates or Rates(config.learning_rate, config.free_learning_rate)
    rate = build_schedule(config, rates.constrained, steps)
    free_rate = None
    if rates.free is not None:
        free_rate = build_schedule(config, rates.free, steps)
    recipe = RECIPES[METHODS[config.method].recipe]
    tx = recipe(config, Setting(manifolds, rate, free_rate, hidden_size))
    clip = [optax.clip_by_global_norm(config.clip)] if config.clip else []
    return optax.chain(*clip, tx), rate


def with_run_data(
    build: Callable[[Rates, Any], optax.GradientTransformation],
    rates: Rates,
    steps: int,
) -> optax.GradientTransformationExtraArgs:
    """The optimiser that takes `rates` and `steps` as arguments of `update`.

    Compiled once, it serves runs at any rates and of any length. The state does not
    depend on them: those given here are only there to make it.
    """

    def update(updates, state, params=None, **extra_args):
        tx = build(extra_args["rates"], extra_args["steps"])
        return tx.update(updates, state, params)

    return optax.GradientTransformationExtraArgs(build(rates, steps).init, update)


class Setting(NamedTuple):
    """What a recipe is made of, beside the configuration."""

    manifolds: Any
    rate: optax.Schedule
    free_rate: optax.Schedule | None
    hidden_size: int


def _inner(config: ResolvedConfig) -> Inner:
    return named_optimizer(config.optimizer, config.weight_decay)


def _adamw(config: ResolvedConfig, given: Setting) -> optax.GradientTransformation:
    inner = _inner(config)
    if config.lora_plus_ratio is None:
        return inner(given.rate)
    ratio = config.lora_plus_ratio
    return lora_plus(given.rate, FactorSpec(), ratio=ratio, inner=inner)


def _stiefel_lora(config: ResolvedConfig, given: Setting):
    assert given.free_rate is not None
    return stiefel_lora(
        given.rate,
        given.manifolds,
        free_learning_rate=given.free_rate,
        inner=_inner(config),
    )


def _stella(config: ResolvedConfig, given: Setting):
    return stella(
        given.rate,
        given.manifolds,
        hidden_size=given.hidden_size,
        inner=_inner(config),
    )


def _loram(config: ResolvedConfig, given: Setting):
    return loram(
        given.rate,
        given.manifolds,
        second_moment=config.second_moment or "row",
        weight_decay=config.weight_decay,
        nuclear_decay=config.nuclear_decay or 0.0,
    )


def _landing_adamw(config: ResolvedConfig, given: Setting):
    # Its own AdamW decays the free factors only.
    inner = None if config.optimizer == "adamw" else _inner(config)
    lower, upper = config.rate_bounds or (0.5, 4.0)
    return landing_adamw(
        given.rate,
        given.manifolds,
        attraction=config.attraction or 1.0,
        lower=lower,
        upper=upper,
        weight_decay=config.weight_decay,
        inner=inner,
    )


RECIPES: dict[
    str, Callable[[ResolvedConfig, Setting], optax.GradientTransformation]
] = {
    "adamw": _adamw,
    "stiefel_lora": _stiefel_lora,
    "stella": _stella,
    "loram": _loram,
    "landing_adamw": _landing_adamw,
}
