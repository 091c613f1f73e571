"""The training step: one function of arrays, compiled once."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, NamedSharding, P

from manifold_lora.distributed.arrays import init_sharded
from manifold_lora.distributed.groups import (
    replicate_per_group,
    split_batch,
    sum_over_groups,
    vmap_over_groups,
)
from manifold_lora.distributed.sharding import (
    auto_partitioned,
    constrain_to_storage,
    storage_specs,
)
from manifold_lora.models.loss import token_loss
from manifold_lora.optimizers.tree import map_points


class TrainState(NamedTuple):
    """Everything that a step changes."""

    factors: Any  # nested dict of the trainable arrays
    opt_state: optax.OptState
    key: Array  # of dropout


def initial_state(
    factors: Any, tx: optax.GradientTransformation, axes: Any, seed: int
) -> TrainState:
    """The state before the first step, of copies that the step may donate."""
    factors = jax.tree.map(jnp.copy, factors)
    opt_state = init_sharded(tx.init, factors, axes)
    mesh = jax.sharding.get_mesh()
    replicated = None if mesh.empty else NamedSharding(mesh, P())
    key = jax.jit(_dropout_key, out_shardings=replicated)(seed)
    return TrainState(factors, opt_state, key)


def _dropout_key(seed: Array) -> Array:
    """A key that the initialisation of the adapters does not draw from."""
    return jax.random.split(jax.random.key(seed))[1]


def largest_residual(manifolds: Any, factors: Any) -> Array:
    """The largest distance of any factor from its manifold."""
    residuals = map_points(lambda m, x: m.residual(x).max(), manifolds, factors)
    return jnp.stack(jax.tree.leaves(residuals)).max()


def make_step(
    rebuild: Callable[..., Any],
    tx: optax.GradientTransformation,
    manifolds: Any,
    axes: Any,
    accumulate: int = 1,
    packed: bool = True,
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """The compiled step (state, frozen, batch, extra) → (state, metrics).

    The state is donated; `extra`, if given, is a dict of further arguments of the
    optimiser's `update`, such as those of `optimizer.with_run_data`.

    A batch passes through memory in `accumulate` equal parts. The gradients of the
    summed losses are added up and divided once by the number of targets of the whole
    batch, so that the result does not depend on the number of parts. On the mesh of
    `jax.set_mesh` every group of devices adds up its own; they are summed over the
    groups once a step.

    Args:
        rebuild: from `adapters.split`.
        tx: maps gradients of the factors to additive updates.
        manifolds: prefix tree of the factors, for the residual; None without.
        axes: names of the axes of the factors, from `adapters.axes`.
        accumulate: number of parts; divides the rows of a batch.
        packed: whether rows hold several sequences. Where they hold one, its padding
            comes after it and causal attention needs no segments, which lets a GPU use
            cuDNN's kernel.

    Returns:
        A function whose metrics are scalars: `loss` (mean over targets), `grad_norm`
        (global, before clipping), `tokens` (without padding) and, with `manifolds`,
        `residual` (after the step).
    """

    @vmap_over_groups
    def summed_loss(factors, frozen, part, keys):
        part = part if packed else part | {"segment_ids": None}
        loss = token_loss(rebuild(factors, frozen), part, keys)
        return loss.nll.sum(), loss.mask.sum()

    def total_loss(copied, *arguments):
        nll, count = summed_loss(copied, *arguments)
        return nll.sum(), (nll, count)

    def gradients(factors, frozen, batch, keys):
        copied = replicate_per_group(factors, axes)

        def add(total, part_and_keys):
            gradient = jax.grad(total_loss, has_aux=True)
            grads, sums = gradient(copied, frozen, *part_and_keys)
            return jax.tree.map(jnp.add, total, (sums, grads)), None

        parts = split_batch((batch, keys), accumulate)
        zero = jnp.zeros(parts[1].shape[1])  # for each group
        zeros = ((zero, zero), jax.tree.map(jnp.zeros_like, copied))
        ((nll, count), grads), _ = jax.lax.scan(add, zeros, parts)
        nll, count = nll.sum(), jnp.maximum(count.sum(), 1)
        grads = jax.tree.map(
            lambda g: g / count.astype(g.dtype), sum_over_groups(grads, axes)
        )
        return nll / count, grads

    tx = optax.with_extra_args_support(tx)

    @partial(jax.jit, donate_argnums=0)
    def step(
        state: TrainState, frozen: Any, batch: dict[str, Array], extra: Any = None
    ):
        key, key_of_rows = jax.random.split(state.key)
        keys = jax.random.split(key_of_rows, batch["input_ids"].shape[0])
        where = (P(), storage_specs(state.factors, axes))
        loss, grads = auto_partitioned(gradients, where)(
            state.factors, frozen, batch, keys
        )
        updates, opt_state = tx.update(
            grads, state.opt_state, state.factors, **(extra or {})
        )
        factors = optax.apply_updates(state.factors, updates)
        metrics = {
            "loss": loss,
            "grad_norm": optax.tree.norm(grads),
            "tokens": (batch["segment_ids"] > 0).sum(),
        }
        if manifolds is not None:
            metrics["residual"] = largest_residual(manifolds, factors)
        state = TrainState(factors, opt_state, key)
        return constrain_to_storage(state, state.factors, axes), metrics

    return step
