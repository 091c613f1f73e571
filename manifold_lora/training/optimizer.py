"""From a configuration to one Optax transformation."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from manifold_lora.adapters.options import OptimizerInputs
from manifold_lora.configuration.parts import ScheduleConfig
from manifold_lora.errors import InputError
from manifold_lora.training.config import TrainConfig


class Rates(NamedTuple):
    """Peaks of the learning rates: numbers, or traced ones."""

    constrained: Any  # of all factors, where there is no second rate
    free: Any = None


def build_schedule(config: ScheduleConfig, peak: Any, steps: Any) -> optax.Schedule:
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


def build_optimizer(
    config: TrainConfig,
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
    rate = build_schedule(config.schedule, rates.constrained, steps)
    free_rate = None
    if rates.free is not None:
        free_rate = build_schedule(config.schedule, rates.free, steps)
    inputs = OptimizerInputs(
        manifolds, rate, free_rate, config.optimizer.weight_decay, hidden_size
    )
    tx = config.adapter.options.transformation(inputs)
    clip = config.optimizer.clip
    before = [optax.clip_by_global_norm(clip)] if clip else []
    return optax.chain(*before, tx), rate


def check_optimizer(
    config: TrainConfig, tx: optax.GradientTransformation, factors: Any
) -> None:
    """Try the optimiser on the shapes of the factors, without computing anything.

    Raises:
        InputError: it cannot be initialised or updated like this, such as one of Optax
            that needs more arguments than gradients.
    """

    def step(factors: Any) -> Any:
        updates, _ = tx.update(factors, tx.init(factors), factors)
        return optax.apply_updates(factors, updates)

    name = getattr(config.adapter.options, "optimizer", config.adapter.method)
    try:
        after = jax.eval_shape(step, factors)
    except Exception as error:  # whatever an optimiser raises
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"--optimizer {name} cannot train these factors: {reason}"
        ) from error
    shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), t) for t in (after, factors)]
    if shapes[0] != shapes[1]:
        raise InputError(
            f"--optimizer {name} changes the shapes or the types of the factors."
        )


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
