"""Run directories without training."""

import jax
import numpy as np
from flax import nnx

import manifold_lora as ml
from tests.tiny import CONFIG

TARGETS = ["q_proj", "down_proj"]


def run_directory(path, method, **options):
    """A run whose adapter is slightly off its initialisation, and the model."""
    model = ml.Llama(CONFIG, rngs=nnx.Rngs(0))
    config = ml.AdapterConfig(method, options, rank=4, targets=TARGETS)
    ml.attach(model, config)
    path.mkdir()
    (path / "config.toml").write_text("")
    ml.save_adapter(model, path / "start")
    rng = np.random.default_rng(1)
    moved = jax.tree.map(
        lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32),
        ml.factors(model),
    )
    ml.set_factors(model, moved)
    ml.save_adapter(model, path / "adapter")
    return model
