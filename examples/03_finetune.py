"""Fine-tune from Python: by one call, and by your own Optax loop on the same model.

    python examples/03_finetune.py

Both train the small built-in LLaMA on the built-in data. For yours, give `ModelConfig`
and `DataConfig` paths, and read them with `ml.load_llama` and `ml.read_records`.
"""

from pathlib import Path

import jax
import optax

import manifold_lora as ml
from manifold_lora.data.builtin import BASE, builtin_records

OUT, STEPS = Path("runs/finetune"), 100

# By one call: as `manifold-lora train`, with everything that a run writes.
config = ml.TrainConfig(
    adapter=ml.AdapterConfig("stiefel", rank=8, targets="all-linear"),
    schedule=ml.ScheduleConfig(steps=STEPS),
    batch=ml.BatchConfig(batch_size=8, sequence_length=128),
    output=ml.OutputConfig(out=OUT, overwrite=True),
)
summary = ml.train(config)
print(f"held-out loss {summary['loss_before']:.3f} → {summary['loss_after']:.3f}")

# By your own loop: the model, its factors and their manifolds are plain JAX and Optax.
model, tokenizer = ml.load_llama(BASE), ml.load_tokenizer(BASE)
records, _ = builtin_records()
examples, report = ml.encode(records, tokenizer, sequence_length=128)
data = ml.batches(examples, batch_size=8, sequence_length=128, seed=0, packing=True)

ml.attach(model, ml.AdapterConfig("stiefel", rank=8))
rebuild, factors, frozen = ml.split(model)
schedule = optax.warmup_cosine_decay_schedule(0.0, 0.03, 10, STEPS)
tx = optax.chain(
    optax.clip_by_global_norm(1.0),
    ml.stiefel_lora(schedule, ml.manifold_tree(model), free_learning_rate=5e-3),
)


@jax.jit
def step(factors, state, frozen, batch):
    """One step; the loss is a mean over answer tokens."""

    def loss(factors):
        tokens = ml.token_loss(rebuild(factors, frozen), batch)
        return tokens.nll.sum() / tokens.mask.sum()

    value, grads = jax.value_and_grad(loss)(factors)
    updates, state = tx.update(grads, state, factors)
    return optax.apply_updates(factors, updates), state, value


state = tx.init(factors)
for number, batch in zip(range(STEPS), data, strict=False):
    factors, state, value = step(factors, state, frozen, batch)
    if number % 20 == 0:
        print(f"step {number:3}: loss {value:.3f}")

ml.set_factors(model, factors)
ml.save_adapter(model, OUT.with_name("own_loop"))  # in PEFT's format
