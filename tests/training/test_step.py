"""The training step against plain sums in NumPy and against itself in micro-batches."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import manifold_lora as ml
from manifold_lora.adapters import axes, split
from manifold_lora.data.batches import batches
from manifold_lora.data.tokens import Example
from manifold_lora.models.loss import token_loss
from manifold_lora.training.step import TrainState, largest_residual, make_step
from tests.tiny import CONFIG
from tests.tolerances import FLOAT32, RESIDUAL


def adapted(method="stiefel", dropout=0.0, seed=0):
    model = ml.Llama(CONFIG, rngs=nnx.Rngs(0))
    model.remat = "none"  # compiles faster; tests/models compares both
    config = ml.AdapterConfig(method, rank=4, targets=["q_proj"], dropout=dropout)
    ml.attach(model, config, seed)
    noise = jax.random.split(jax.random.key(9))
    factors = ml.factors(model)
    q = factors["layers"]["self_attn"]["q_proj"]
    q["a"] = q["a"] + 0.3 * jax.random.normal(noise[0], q["a"].shape)
    ml.set_factors(model, factors)
    return model


def examples(lengths=(5, 9, 3, 7, 4, 6, 8, 2)):
    rng = np.random.default_rng(0)
    made = []
    for length in lengths:
        ids = rng.integers(2, CONFIG.vocab_size, length).astype(np.int32)
        made.append(Example(ids, np.arange(length) >= max(1, length // 2)))
    return made


def batch_of(chosen, **options):
    sizes: dict[str, Any] = {"batch_size": len(chosen), "sequence_length": 12}
    return next(iter(batches(chosen, seed=0, shuffle=False, **sizes | options)))


def run(model, batch, tx, accumulate=1, steps=1, packed=True):
    rebuild, factors, frozen = split(model)
    tags = ml.manifold_tree(model)
    step = make_step(rebuild, tx, tags, axes(model), accumulate, packed)
    # the step donates its state, and the model keeps its own arrays
    factors = jax.tree.map(jnp.copy, factors)
    state = TrainState(factors, jax.jit(tx.init)(factors), jax.random.key(0))
    metrics = {}
    for _ in range(steps):
        state, metrics = step(state, frozen, batch)
    return state, {name: float(value) for name, value in metrics.items()}


def test_loss_is_the_mean_over_answer_tokens():
    model, chosen = adapted(), examples()
    batch = batch_of(chosen)
    _, metrics = run(model, batch, optax.sgd(0.0))
    forward = nnx.jit(lambda model, ids: model(ids))
    total = count = 0.0
    for example in chosen:  # each by itself, log-softmax in float64
        padded = np.zeros((1, 12), np.int32)
        padded[0, : len(example.input_ids)] = example.input_ids
        logits = np.asarray(forward(model, padded)[0], np.float64)
        logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        for t in np.flatnonzero(example.loss_mask):
            total -= logs[t - 1, example.input_ids[t]]
            count += 1
    assert metrics["loss"] == pytest.approx(total / count, rel=FLOAT32)


def test_packed_rows_cost_what_separate_rows_cost():
    model, chosen = adapted(), examples()
    loss_of = nnx.jit(token_loss)
    separate = loss_of(model, batch_of(chosen))
    packed_batch = batch_of(
        chosen, packing=True, epochs=1, batch_size=4, sequence_length=16
    )
    assert packed_batch["segment_ids"].max() > 1
    packed = loss_of(model, packed_batch)
    assert packed.mask.sum() == separate.mask.sum()
    np.testing.assert_allclose(packed.nll.sum(), separate.nll.sum(), rtol=FLOAT32)

    def gradient(batch):
        rebuild, factors, frozen = split(model)

        def loss(f):
            return token_loss(rebuild(f, frozen), batch).nll.sum()

        return jax.tree.leaves(jax.jit(jax.grad(loss))(factors))

    for a, b in zip(gradient(packed_batch), gradient(batch_of(chosen)), strict=True):
        np.testing.assert_allclose(a, b, atol=FLOAT32 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("accumulate", [2, 8])
def test_accumulation_is_one_big_batch(accumulate):
    # Parts hold different numbers of answer tokens: a mean of means would differ.
    batch = batch_of(examples())
    counts = batch["loss_mask"].reshape(accumulate, -1).sum(1)
    assert len(set(counts.tolist())) > 1
    at_once, metrics = run(adapted(), batch, optax.sgd(0.1))
    parts, metrics_parts = run(adapted(), batch, optax.sgd(0.1), accumulate)
    assert metrics_parts["loss"] == pytest.approx(metrics["loss"], rel=FLOAT32)
    assert metrics_parts["grad_norm"] == pytest.approx(metrics["grad_norm"], rel=1e-5)
    for a, b in zip(
        jax.tree.leaves(parts.factors), jax.tree.leaves(at_once.factors), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=FLOAT32)


def test_gradient_norm_is_measured_before_clipping():
    batch = batch_of(examples())
    tx = optax.chain(optax.clip_by_global_norm(1e-3), optax.sgd(1.0))
    before, after = adapted(), adapted()
    state, metrics = run(after, batch, tx)
    moved = jax.tree.map(jnp.subtract, state.factors, ml.factors(before))
    assert metrics["grad_norm"] > 2e-3
    assert float(optax.tree.norm(moved)) == pytest.approx(1e-3, rel=1e-3)


def test_residual_is_that_of_the_worst_factor():
    model = adapted()
    factors, tags = ml.factors(model), ml.manifold_tree(model)
    q = factors["layers"]["self_attn"]["q_proj"]
    assert largest_residual(tags, factors) < RESIDUAL
    q["b"] = q["b"].at[1, 3, 2].add(0.25)
    b = np.asarray(q["b"][1], np.float64)
    worst = np.abs(b.T @ b - np.eye(4)).max()
    assert float(largest_residual(tags, factors)) == pytest.approx(worst, rel=1e-5)


def test_dropout_changes_with_the_step_and_repeats_with_the_seed():
    batch = batch_of(examples())
    losses = [
        run(adapted(dropout=0.5), batch, optax.sgd(0.0), steps=s)[1]["loss"]
        for s in (1, 2, 2)
    ]
    assert losses[0] != losses[1] == losses[2]


def test_every_row_of_every_step_drops_out_by_itself(monkeypatch):
    rows = []

    def recorded(model, batch, keys):
        jax.debug.callback(
            lambda x: rows.extend(np.atleast_2d(x)), jax.random.key_data(keys)
        )
        return token_loss(model, batch, keys)

    monkeypatch.setattr("manifold_lora.training.step.token_loss", recorded)
    batch = batch_of(examples())
    run(adapted(dropout=0.5), batch, optax.sgd(0.0), accumulate=2, steps=2)
    jax.effects_barrier()
    assert len({tuple(key) for key in rows}) == 2 * len(batch["input_ids"])


def test_base_is_frozen_and_factors_stay_on_their_manifold():
    model = adapted()
    rebuild, _, frozen = split(model)
    before = jax.tree.map(np.array, frozen)
    tx = ml.stiefel_lora(0.3, ml.manifold_tree(model), free_learning_rate=1e-2)
    state, metrics = run(model, batch_of(examples()), tx, steps=10)
    assert metrics["residual"] < RESIDUAL
    for a, b in zip(
        jax.tree.leaves(before), jax.tree.leaves(split(model)[2]), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    assert jax.tree.structure(state.factors) == jax.tree.structure(ml.factors(model))


def test_bfloat16_base_keeps_float32_factors():
    model = ml.Llama(CONFIG, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    model.remat = "none"
    ml.attach(model, ml.AdapterConfig("stiefel", rank=4, targets="q_proj"))
    tx = ml.stiefel_lora(0.2, ml.manifold_tree(model), free_learning_rate=1e-2)
    state, metrics = run(model, batch_of(examples()), tx, steps=20)
    assert {x.dtype for x in jax.tree.leaves(state.factors)} == {jnp.dtype("float32")}
    assert metrics["residual"] < RESIDUAL


def test_rows_of_one_sequence_need_no_segments():
    batch = batch_of(examples())
    assert batch["segment_ids"].max() == 1 and batch["segment_ids"].min() == 0
    (one, metrics), (other, needed) = (
        run(adapted(), batch, optax.sgd(1.0), packed=packed) for packed in (False, True)
    )
    assert metrics == pytest.approx(needed, rel=FLOAT32)
    for x, y in zip(*map(jax.tree.leaves, (one.factors, other.factors)), strict=True):
        np.testing.assert_allclose(x, y, atol=FLOAT32)


def test_compile_time_does_not_grow_with_depth():
    # The program is one scan body whatever the depth.
    sizes = {}
    for layers in (2, 16):
        config = CONFIG.__class__(**{**vars(CONFIG), "num_hidden_layers": layers})
        model = ml.Llama(config, rngs=nnx.Rngs(0))
        ml.attach(model, ml.AdapterConfig("stiefel", rank=4, targets="q_proj"))
        rebuild, factors, frozen = split(model)
        tx = ml.stiefel_lora(0.1, ml.manifold_tree(model))
        state = TrainState(factors, jax.jit(tx.init)(factors), jax.random.key(0))
        step = make_step(rebuild, tx, ml.manifold_tree(model), axes(model))
        sizes[layers] = len(
            step.lower(state, frozen, batch_of(examples())).as_text().splitlines()  # pyright: ignore
        )
    assert sizes[16] == sizes[2]
