"""The training step: one function of arrays, compiled once."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from manifold_lora.evaluation.loss import token_loss
from manifold_lora.optimizers.tree import map_points


class TrainState(NamedTuple):
    """Everything that a step changes."""

    factors: Any  # nested dict of the trainable arrays
    opt_state: optax.OptState
    key: Array  # of dropout


def largest_residual(manifolds: Any, factors: Any) -> Array:
    """The largest distance of any factor from its manifold."""
    residuals = map_points(lambda m, x: m.residual(x).max(), manifolds, factors)
    return jnp.stack(jax.tree.leaves(residuals)).max()


def make_step(
    rebuild: Callable[..., Any],
    tx: optax.GradientTransformation,
    manifolds: Any,
    accumulate: int = 1,
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """The compiled step (state, frozen, batch, extra) → (state, metrics).

    The state is donated; `extra`, if given, is a dict of further arguments of the
    optimiser's `update`, such as those of `optimizer.with_run_data`.

    A batch passes through memory in `accumulate` equal parts. The gradients of the
    summed losses are added up and divided once by the number of targets of the whole
    batch, so that the result does not depend on the number of parts.

    Args:
        rebuild: from `adapters.split`.
        tx: maps gradients of the factors to additive updates.
        manifolds: prefix tree of the factors, for the residual.
        accumulate: number of parts; divides the rows of a batch.

    Returns:
        A function whose metrics are scalars: `loss` (mean over targets), `grad_norm`
        (global, before clipping) and `residual` (after the step).
    """

    def summed_loss(factors, frozen, part, key):
        loss = token_loss(rebuild(factors, frozen), part, key)
        return loss.nll.sum(), loss.mask.sum()

    tx = optax.with_extra_args_support(tx)

    @partial(jax.jit, donate_argnums=0)
    def step(
        state: TrainState, frozen: Any, batch: dict[str, Array], extra: Any = None
    ):
        key, *keys = jax.random.split(state.key, accumulate + 1)
        parts = jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), batch)

        def add(total, part_and_key):
            gradient = jax.value_and_grad(summed_loss, has_aux=True)
            (nll, count), grads = gradient(state.factors, frozen, *part_and_key)
            return jax.tree.map(jnp.add, total, (nll, count, grads)), None

        zeros = (
            jnp.zeros(()),
            jnp.zeros(()),
            jax.tree.map(jnp.zeros_like, state.factors),
        )
        (nll, count, grads), _ = jax.lax.scan(add, zeros, (parts, jnp.stack(keys)))
        count = jnp.maximum(count, 1)
        grads = jax.tree.map(lambda g: g / count.astype(g.dtype), grads)

        updates, opt_state = tx.update(
            grads, state.opt_state, state.factors, **(extra or {})
        )
        factors = optax.apply_updates(state.factors, updates)
        metrics = {
            "loss": nll / count,
            "grad_norm": optax.tree.norm(grads),
            "residual": largest_residual(manifolds, factors),
        }
        return TrainState(factors, opt_state, key), metrics

    return step
