"""Every method trained for some steps on a bfloat16 base: its factors stay float32 and
on their manifold, and a saved adapter continues training bit for bit."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import manifold_lora as ml
from manifold_lora.adapters import AdapterConfig, adapters, attach, axes, split
from manifold_lora.adapters.exported import as_exported
from manifold_lora.checkpoints.peft import load_adapter, save_adapter
from manifold_lora.data.batches import batches
from manifold_lora.data.tokens import Example
from manifold_lora.methods import METHODS
from manifold_lora.training.optimizer import build_optimizer
from manifold_lora.training.step import TrainState, largest_residual, make_step
from tests import adapters as tiny
from tests.cases import slow_but
from tests.configs import train_config
from tests.tolerances import RESIDUAL

pytestmark = pytest.mark.usefixtures("quick_compilation")
STEPS = 6
# Ranks 4, 4, 4 in one stack and 2, 4, 0 in another.
TARGETS = r".*\.q_proj|model\.layers\.[01]\.mlp\.down_proj"
PATTERN = {r"layers\.0\.mlp\.down_proj": 2}


def feed() -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    examples = [
        Example(rng.integers(2, 61, 9).astype(np.int32), np.arange(9) >= 4)
        for _ in range(2 * STEPS)
    ]
    sizes: dict[str, Any] = {"batch_size": 2, "sequence_length": 9}
    stream = batches(examples, seed=0, epochs=1, **sizes)
    return [dict(batch) for batch in stream]


def program(model: ml.Llama) -> str:
    graph, state = nnx.split(model)
    tokens = jnp.asarray(tiny.IDS)
    return str(jax.make_jaxpr(lambda state: nnx.merge(graph, state)(tokens))(state))


def same(one: Any, other: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("method", slow_but(["lora", "loram_br"], METHODS))
def test_a_saved_adapter_continues_bit_for_bit(method: str, tmp_path: Path):
    given = AdapterConfig(method, rank=4, targets=TARGETS, rank_pattern=PATTERN)
    model = tiny.base(jnp.bfloat16)
    model.remat = "none"
    attach(model, given)
    config = train_config(method=method, warmup_steps=2)
    tags = ml.manifold_tree(model)
    tx, _ = build_optimizer(config, tags, STEPS, tiny.CONFIG["hidden_size"])
    rebuild, factors, frozen = split(model)
    step = make_step(rebuild, tx, tags, axes(model))
    start = jax.tree.map(jnp.copy, factors)  # the step donates its state
    state = TrainState(start, jax.jit(tx.init)(start), jax.random.key(0))
    stream = feed()
    assert len(stream) == STEPS
    residuals = []

    def run(state: TrainState, frozen: Any, part: list[Any]) -> TrainState:
        for batch in part:
            state, metrics = step(state, frozen, batch)
            residuals.append(float(metrics["residual"]))
            assert np.isfinite(float(metrics["loss"]))
        return state

    half = run(state, frozen, stream[:3])
    ml.set_factors(model, jax.tree.map(jnp.copy, half.factors))
    rest = jax.tree.map(jnp.copy, (half.opt_state, half.key))
    uninterrupted = run(half, frozen, stream[3:])

    save_adapter(model, tmp_path / "a")
    again = tiny.base(jnp.bfloat16)
    again.remat = "none"
    load_adapter(again, tmp_path / "a")
    assert program(again) == program(model)
    same(tiny.arrays(again), tiny.arrays(model))
    _, loaded, fresh = split(again)
    same(fresh, frozen)
    other = run(TrainState(jax.tree.map(jnp.copy, loaded), *rest), fresh, stream[3:])
    if method != "loram_fr":  # what fills up its S is 1 to rounding, and 1 once loaded
        same(other[:2], uninterrupted[:2])
    ml.set_factors(again, other.factors)
    ml.set_factors(model, uninterrupted.factors)
    same(tiny.arrays(again), tiny.arrays(model))

    # What else a run must keep
    dtypes = {x.dtype for x in jax.tree.leaves(uninterrupted.factors)}
    assert dtypes == {np.dtype("float32")}
    for x, y in zip(
        jax.tree.leaves(uninterrupted.factors), jax.tree.leaves(factors), strict=True
    ):
        assert (x != y).any()
    assert len(residuals) == STEPS + 3
    for module in adapters(model).values():
        updates = np.asarray(module.weight()).any(axis=(1, 2)).tolist()
        assert updates == [rank > 0 for rank in module.ranks]
    if not method.startswith("landing"):
        assert max(residuals) < RESIDUAL
        return
    assert RESIDUAL < max(residuals) < 0.05  # near the manifold
    with as_exported(model, project_on_export=True):
        assert largest_residual(tags, ml.factors(model)) < RESIDUAL
