"""A training run as abstract shapes: what `train` builds, without any array."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import P
from jax.sharding import Mesh, NamedSharding

from manifold_lora.adapters import attach, axes, manifold_tree, split
from manifold_lora.distributed.mesh import BATCH_AXES
from manifold_lora.distributed.sharding import logical_axes, specs_like, storage_spec
from manifold_lora.errors import InputError
from manifold_lora.models import Llama, LlamaConfig
from manifold_lora.models.quantised import quantise
from manifold_lora.models.remat import Remat
from manifold_lora.training.config import TrainConfig
from manifold_lora.training.optimizer import build_optimizer
from manifold_lora.training.step import TrainState, make_step


class AbstractRun(NamedTuple):
    """The programs of a run and their arguments, as shapes with shardings on a mesh."""

    mesh: Mesh
    step: Any  # jitted, as in training
    state: TrainState
    frozen: Any
    batch: dict[str, jax.ShapeDtypeStruct]
    tx: optax.GradientTransformation

    def traced(self) -> Any:
        """The traced training step, ready to be lowered."""
        with jax.set_mesh(self.mesh):
            return self.step.trace(self.state, self.frozen, self.batch)

    def traced_update(self) -> Any:
        """The traced optimiser update alone."""

        def update(grads: Any, opt_state: Any, factors: Any) -> Any:
            updates, opt_state = self.tx.update(grads, opt_state, factors)
            return optax.apply_updates(factors, updates), opt_state

        factors, opt_state, _ = self.state
        shardings = jax.tree.map(lambda x: x.sharding, (factors, opt_state))
        jitted = jax.jit(update, out_shardings=shardings, donate_argnums=(1, 2))
        with jax.set_mesh(self.mesh):
            return jitted.trace(factors, opt_state, factors)


def abstract_model(config: TrainConfig, shape: LlamaConfig) -> Llama:
    """The model of a run with its adapter, as abstract shapes.

    Raises:
        InputError: as in `attach`, or layers of a module have different ranks.
    """

    def build() -> Llama:
        model = Llama(shape, dtype=jnp.dtype(config.model.dtype), rngs=nnx.Rngs(0))
        if config.model.base_dtype is not None:
            quantise(model, config.model.base_dtype)
        attach(model, config.adapter, config.optimizer.seed)
        return model

    try:
        return nnx.eval_shape(build)
    except jax.errors.ConcretizationTypeError as error:
        raise InputError(
            "a plan needs one rank for all layers of a module, but --targets or "
            "--rank-pattern give them different ranks: name modules only, such as "
            "q_proj, and plan with the largest rank."
        ) from error


def abstract_run(
    config: TrainConfig, model: Llama, mesh: Mesh, remat: Remat = "block"
) -> AbstractRun:
    """The run of a configuration on a mesh, with the model of `abstract_model`."""
    model.remat = remat
    rebuild, factors, frozen = split(model)
    tags, factor_axes = manifold_tree(model), axes(model)
    steps = config.schedule.steps or 1
    tx, _ = build_optimizer(config, tags, steps, model.config.hidden_size)

    def place(x: Any, spec: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, spec)
        )

    opt_state = jax.eval_shape(tx.init, factors)
    specs = specs_like(opt_state, factors, factor_axes, mesh)
    key: Any = place(jax.eval_shape(lambda: jax.random.key(0)), P())
    state = TrainState(
        jax.tree.map(
            lambda x, a: place(x, storage_spec(a, x.shape, mesh)), factors, factor_axes
        ),
        jax.tree.map(place, opt_state, specs),
        key,
    )
    leaves, tree = jax.tree.flatten(frozen)
    variables = [variable for _, variable in nnx.to_flat_state(frozen)]
    placed = [
        place(leaf, storage_spec(logical_axes(variable), leaf.shape, mesh))
        for leaf, variable in zip(leaves, variables, strict=True)
    ]
    step = make_step(rebuild, tx, tags, factor_axes, config.batch.accumulate)
    return AbstractRun(
        mesh, step, state, tree.unflatten(placed), _batch(config, place), tx
    )


def _batch(config: TrainConfig, place: Callable[..., Any]) -> dict[str, Any]:
    shape = (config.batch.batch_size, config.batch.sequence_length)
    ids = jax.ShapeDtypeStruct(shape, jnp.int32)
    names = ("input_ids", "positions", "segment_ids")
    arrays = dict.fromkeys(names, place(ids, P(BATCH_AXES)))
    mask = jax.ShapeDtypeStruct(shape, jnp.float32)
    return arrays | {"loss_mask": place(mask, P(BATCH_AXES))}


def bytes_per_device(tree: Any) -> int:
    """Bytes that the shards of a tree's arrays occupy on each device."""
    total = 0
    for x in jax.tree.leaves(tree):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            continue  # a few bytes, without an itemsize
        shard = x.sharding.shard_shape(x.shape)
        total += math.ceil(jax.dtypes.itemsize_bits(x.dtype) * math.prod(shard) / 8)
    return total
