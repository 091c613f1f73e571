"""Training step, optimiser step and generation on one accelerator, as JSON.

    python benchmarks/gpu.py [CASE ...] [--out gpu.json]

Random weights in bfloat16, LoRA of rank 16 on all linears, AdamW, every token a target,
one sequence a row. Runs unchanged on a CUDA machine with `pip install
'manifold-lora[quantised]' 'jax[cuda12]'`, and on a CPU with the cases tiny. step_bytes
is the memory of the compiled training step, peak_bytes what the device reports of the
whole process, with generation and the making of the model; null where it does not.

For comparison, published by NeMo AutoModel for one H100: 12,473 tokens/s for
Llama-3-8B, LoRA of rank 16 on all linears, sequence 4,096, micro-batch 2, bfloat16; by
torchtune: 16 GiB for 8B.
"""

import argparse
import importlib.metadata
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import manifold_lora as ml
from manifold_lora.adapters import axes, split
from manifold_lora.models.shapes import SHAPES
from manifold_lora.training.step import initial_state, make_step

TINY = ml.LlamaConfig(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=64,
)


class Case(NamedTuple):
    """What is measured."""

    shape: str
    method: str = "lora"
    rows: int = 2
    tokens: int = 4096
    remat: Any = "block"
    base_dtype: Any = None


CASES = {
    "tiny": Case("tiny", "stella", 2, 128),
    "tiny nf4": Case("tiny", "lora", 2, 128, base_dtype="nf4"),
    "1b 2048": Case("llama-3.2-1b", rows=8, tokens=2048),
    "1b 4096": Case("llama-3.2-1b", rows=4),
    "1b 4096 dots": Case("llama-3.2-1b", rows=4, remat="dots"),
    "1b 4096 stella": Case("llama-3.2-1b", "stella", rows=4),
    "8b 2048": Case("llama-3-8b", rows=4, tokens=2048),
    "8b 4096": Case("llama-3-8b"),
    "8b 4096 dots": Case("llama-3-8b", remat="dots"),
    "8b 4096 nf4": Case("llama-3-8b", base_dtype="nf4"),
    "8b 4096 stiefel": Case("llama-3-8b", "stiefel"),
}


def median_seconds(run: Callable[[], Any], count: int = 10) -> float:
    """Of some calls after two that compile and warm up."""
    times = []
    for _ in range(count + 2):
        started = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - started)
    return median(times[2:])


def step_bytes(step: Any, *arguments: Any) -> int:
    """Of the compiled step: arguments, results that are not theirs, and temporaries."""
    memory = step.lower(*arguments).compile().memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + results + memory.temp_size_in_bytes


def peak_bytes() -> int | None:
    """Of the device since the process began."""
    statistics = jax.devices()[0].memory_stats() or {}
    return statistics.get("peak_bytes_in_use")


def generation_seconds(model: ml.Llama, rows: int, count: int) -> float:
    """Of `count` new tokens for each of some prompts of 64 tokens, greedy."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(5, model.config.vocab_size, (rows, 64))

    def run() -> np.ndarray:
        return ml.generate(model, prompts, max_new_tokens=count, stop_tokens=())

    return median_seconds(run, 3)


def measure(case: Case) -> dict[str, Any]:
    """Seconds, rates and peaks of one case."""
    from manifold_lora.models.quantised import quantise

    config = TINY if case.shape == "tiny" else SHAPES[case.shape]

    @nnx.jit
    def build() -> ml.Llama:
        model = ml.Llama(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        return quantise(model, case.base_dtype) if case.base_dtype else model

    model = build()
    model.remat = case.remat
    shape = (case.rows, case.tokens)
    count = min(128, case.tokens // 2)
    generation = generation_seconds(model, case.rows, count)
    ml.attach(model, ml.AdapterConfig(case.method, rank=16))
    rebuild, factors, frozen = split(model)
    tx, names, tags = optax.adamw(1e-4), axes(model), ml.manifold_tree(model)
    if case.method != "lora":
        tx = ml.riemannian(tx, tags)
    del model
    state = initial_state(factors, tx, names, 0)
    step = make_step(rebuild, tx, None, names, packed=False)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, shape)
    batch = {
        "input_ids": jnp.asarray(ids, jnp.int32),
        "loss_mask": jnp.ones(shape),
        "positions": jnp.broadcast_to(jnp.arange(case.tokens), shape),
        "segment_ids": jnp.ones(shape, jnp.int32),
    }

    def train() -> Any:
        nonlocal state
        state, metrics = step(state, frozen, batch)
        return metrics

    started = time.perf_counter()
    jax.block_until_ready(train())
    compiled = time.perf_counter() - started
    seconds = median_seconds(train)
    gradients = jax.tree.map(jnp.ones_like, state.factors)

    @jax.jit
    def optimise(gradients: Any, opt_state: Any, factors: Any) -> Any:
        updates, opt_state = tx.update(gradients, opt_state, factors)
        return optax.apply_updates(factors, updates), opt_state

    optimizer = median_seconds(
        lambda: optimise(gradients, state.opt_state, state.factors)
    )
    return {
        "device": jax.devices()[0].device_kind,
        **case._asdict(),
        "compile_seconds": compiled,
        "step_seconds": seconds,
        "tokens_per_second": case.rows * case.tokens / seconds,
        "optimizer_seconds": optimizer,
        "generated_tokens_per_second": case.rows * count / generation,
        "step_bytes": step_bytes(step, state, frozen, batch),
        "peak_bytes": peak_bytes(),
    }


def main() -> None:
    """Measure each case in a process of its own, and write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    real = [name for name, case in CASES.items() if case.shape != "tiny"]
    parser.add_argument("cases", nargs="*", default=real)
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--measure", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(CASES[options.measure])))
        return
    # Without asking for the devices: this process would take their memory.
    versions = {n: importlib.metadata.version(n) for n in ("jax", "jaxlib", "flax")}
    results: dict[str, Any] = {"versions": versions, "cases": {}}
    for name in options.cases:
        command = [sys.executable, __file__, "--measure", name]
        done = subprocess.run(command, capture_output=True, text=True)
        lines = (done.stdout if not done.returncode else done.stderr).splitlines()
        last = lines[-1] if lines else ""
        # A case that fails, such as for want of memory, leaves the others.
        found = {"error": last} if done.returncode else json.loads(last)
        results["cases"][name] = found
        print(name, json.dumps(found), flush=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
