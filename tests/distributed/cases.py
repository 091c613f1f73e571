"""Meshes of eight devices, and a small model with adapters to run on them."""

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import P
from jax.sharding import AxisType, Mesh, NamedSharding

import manifold_lora as ml
from manifold_lora.adapters import adapters, axes, split
from manifold_lora.configuration.parts import ScheduleConfig
from manifold_lora.distributed.arrays import BatchSharder, init_sharded, shard_module
from manifold_lora.distributed.mesh import make_mesh, read_mesh
from manifold_lora.evaluation.heldout import make_evaluate
from manifold_lora.training.config import TrainConfig
from manifold_lora.training.optimizer import build_optimizer
from manifold_lora.training.step import TrainState, make_step
from tests.compilation import QUICK

MESHES = ("fsdp=8", "data=4,fsdp=2", "data=2,fsdp=2,tensor=2")
# Three layers and a vocabulary of 61, which no mesh divides.
CONFIG = ml.LlamaConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)
ROWS, LENGTH = 16, 6


def build_mesh(text: str, explicit: bool = False) -> Mesh:
    mesh = make_mesh(read_mesh(text), jax.devices())
    kind = AxisType.Explicit if explicit else AxisType.Auto
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(kind,) * 3)


def build_model(
    method: str, config: ml.LlamaConfig = CONFIG, **options: Any
) -> ml.Llama:
    """A random model with adapters; the caller may modify it."""
    return nnx.clone(_model(method, config, json.dumps(options)))


@functools.cache
def _model(method: str, config: ml.LlamaConfig, options: str) -> ml.Llama:
    model = ml.Llama(config, rngs=nnx.Rngs(0))
    model.remat = "none"  # compiles faster; tests/models compares both
    defaults = {"rank": 4, "dropout": 0.2, "targets": ["q_proj", "down_proj"]}
    ml.attach(model, ml.AdapterConfig(method, **defaults | json.loads(options)))
    return model


def random_batch(seed: int = 0) -> dict[str, np.ndarray]:
    """Rows of 2 to 6 tokens with 0 to 5 targets, padded on the right."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, LENGTH + 1, ROWS)
    real = np.arange(LENGTH) < lengths[:, None]
    targets = rng.random((ROWS, LENGTH)) < np.linspace(0.1, 0.9, ROWS)[:, None]
    return {
        "input_ids": rng.integers(0, CONFIG.vocab_size, (ROWS, LENGTH)).astype(np.int32)
        * real,
        "loss_mask": (targets & real).astype(np.float32),
        "positions": np.arange(LENGTH, dtype=np.int32) * real,
        "segment_ids": real.astype(np.int32),
    }


class Run:
    """A model and its training step, on the ambient mesh if one is set."""

    def __init__(self, model: ml.Llama, accumulate: int = 1):
        adapter = next(iter(adapters(model).values())).config
        shard_module(model)
        self.model, self.axes, tags = model, axes(model), ml.manifold_tree(model)
        # The rates of the built-in base: a wrong step exceeds the tolerances.
        config = TrainConfig(adapter=adapter, schedule=ScheduleConfig(warmup_steps=0))
        self.tx, _ = build_optimizer(config, tags, 10, model.config.hidden_size)
        rebuild, self.factors, self.frozen = split(model)
        self.rebuild = rebuild
        self.step: Any = make_step(rebuild, self.tx, tags, self.axes, accumulate)
        self.evaluate = make_evaluate(rebuild, self.axes)
        self.state = TrainState(
            self.factors,
            init_sharded(self.tx.init, self.factors, self.axes),
            replicate(jax.random.key(0)),
        )

    @functools.cached_property
    def compiled(self) -> Any:
        """The step, compiled with `QUICK`."""
        return self.step.lower(
            self.state, self.frozen, shard_batch(random_batch())
        ).compile(QUICK)


@contextmanager
def use_mesh(text: str | None, explicit: bool = False) -> Iterator[Mesh | None]:
    """Set the ambient mesh; None leaves it unset, for one device."""
    if text is None:
        yield None
    else:
        mesh = build_mesh(text, explicit)
        with jax.set_mesh(mesh):
            yield mesh


def replicate(x: jax.Array) -> jax.Array:
    """The array, replicated over the ambient mesh."""
    mesh = jax.sharding.get_mesh()
    return x if mesh.empty else jax.device_put(x, NamedSharding(mesh, P()))


def shard_batch(batch: dict[str, np.ndarray]) -> Any:
    """The batch, sharded over the ambient mesh."""
    mesh = jax.sharding.get_mesh()
    return batch if mesh.empty else BatchSharder(mesh, ROWS)(batch)
