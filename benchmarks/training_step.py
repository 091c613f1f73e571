"""Tokens a second and peak memory of a LoRA step, beside PEFT on the same shapes.

    python benchmarks/training_step.py [SHAPE ...] [--arms ARM ...] [--rounds 3]
    python benchmarks/training_step.py smollm2 --arms dots stiefel stella loram_br

Random weights in float32, rank 16 on all linears, every token a target. Each arm runs
in a process of its own, which the rounds repeat in turns; a process warms up and
reports the median of its steps, also over that of the first arm, and its peak resident
memory. Ours are named by the rematerialisation policy, with plain LoRA and AdamW, or by
the method, with its own optimiser and the policy dots; the last column is the rate of
products alone (XLA's, square, counted at 4 operations per parameter and token). Needs
the extra hf.
"""

# pyright: reportMissingImports=false

import argparse
import importlib.metadata
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

from manifold_lora.methods import METHODS

# hidden, intermediate, layers, heads, key heads, vocabulary, rows, tokens per row
SHAPES = {
    "288x6-512": (288, 768, 6, 6, 6, 512, 8, 256),
    "288x6-32000": (288, 768, 6, 6, 6, 32000, 8, 256),
    "2048x4": (2048, 8192, 4, 32, 8, 32000, 4, 256),
    "smollm2": (576, 1536, 30, 9, 3, 49152, 4, 256),
    "288x6-long": (288, 768, 6, 6, 6, 512, 2, 1024),
}
POLICIES = ("block", "dots", "none")


def parameters(shape: tuple[int, ...]) -> int:
    """Weights that multiply a token, the head included."""
    d, m, layers, heads, kv_heads, vocabulary, *_ = shape
    keys = d * kv_heads // heads
    return layers * (2 * d * d + 2 * d * keys + 3 * d * m) + d * vocabulary


def jax_steps(shape: tuple[int, ...], arm: str) -> Iterator[Callable[[], None]]:
    """Our step, as `train` runs it."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    import manifold_lora as ml
    from manifold_lora.adapters import axes, manifold_tree, split
    from manifold_lora.training.config import TrainConfig
    from manifold_lora.training.optimizer import build_optimizer
    from manifold_lora.training.step import initial_state, make_step

    d, m, layers, heads, kv_heads, vocabulary, rows, tokens = shape
    config = ml.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=d,
        intermediate_size=m,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=d // heads,
    )
    policy: Any
    method, policy = ("lora", arm) if arm in POLICIES else (arm, "dots")
    model = ml.Llama(config, rngs=nnx.Rngs(0))
    model.remat = policy
    adapter = ml.AdapterConfig(method, rank=16)
    ml.attach(model, adapter)
    rebuild, factors, frozen = split(model)
    run_config = TrainConfig(adapter=adapter)
    tx, _ = build_optimizer(run_config, manifold_tree(model), 1000, d)
    names = axes(model)
    del model
    state = initial_state(factors, tx, names, 0)
    step = make_step(rebuild, tx, None, names)
    ids = np.random.default_rng(0).integers(0, vocabulary, (rows, tokens))
    ones = jnp.ones(ids.shape, jnp.int32)
    batch = {
        "input_ids": jnp.asarray(ids, jnp.int32),
        "loss_mask": ones.astype(jnp.float32),
        "positions": jnp.broadcast_to(jnp.arange(tokens), ids.shape),
        "segment_ids": ones,
    }

    def run() -> None:
        nonlocal state
        state, metrics = step(state, frozen, batch)
        jax.block_until_ready(metrics)

    while True:
        yield run


def peft_steps(shape: tuple[int, ...]) -> Iterator[Callable[[], None]]:
    """PEFT's step with scaled_dot_product_attention and torch's AdamW."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    d, m, layers, heads, kv_heads, vocabulary, rows, tokens = shape
    torch.manual_seed(0)
    torch.set_num_threads(os.cpu_count() or 1)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=d,
        intermediate_size=m,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        use_cache=False,
    )
    config._attn_implementation = "sdpa"
    lora = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear")
    model = get_peft_model(LlamaForCausalLM(config), lora)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    ids = torch.randint(0, vocabulary, (rows, tokens))

    def run() -> None:
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()

    while True:
        yield run


def measure(shape: tuple[int, ...], arm: str, seconds: float) -> dict[str, float]:
    """Median seconds of a step and peak resident memory, in MB, of this process."""
    steps = peft_steps(shape) if arm == "peft" else jax_steps(shape, arm)
    run = next(steps)
    run()
    run()
    times: list[float] = []
    begun = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - begun < seconds:
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return {"seconds": median(times), "peak": peak}


def product_rate() -> float:
    """Operations a second of a large square product in XLA."""
    import jax
    import jax.numpy as jnp

    n = 2048
    x = jnp.ones((n, n))
    product = jax.jit(jnp.matmul)
    times = []
    for _ in range(10):
        started = time.perf_counter()
        jax.block_until_ready(product(x, x))
        times.append(time.perf_counter() - started)
    return 2 * n**3 / median(times)


def main() -> None:
    """Run the arms in turns and print a table for each shape."""
    arms = (*POLICIES, "peft")
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("shapes", nargs="*", default=["288x6-512", "288x6-32000"])
    parser.add_argument("--arms", nargs="+", choices=(*arms, *METHODS), default=arms)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0, help="per process")
    parser.add_argument("--measure", nargs=2, metavar=("SHAPE", "ARM"))
    options = parser.parse_args()
    if options.measure:
        name, arm = options.measure
        print(json.dumps(measure(SHAPES[name], arm, options.seconds)))
        return
    versions = {
        name: importlib.metadata.version(name)
        for name in ("jax", "torch", "transformers", "peft")
    }
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    for name in options.shapes:
        results: dict[str, list[dict[str, Any]]] = {arm: [] for arm in options.arms}
        rates = []
        for _ in range(options.rounds):
            rates.append(product_rate())
            for arm in options.arms:
                command = [sys.executable, __file__, "--measure", name, arm]
                command += ["--seconds", str(options.seconds)]
                output = subprocess.run(command, capture_output=True, text=True)
                if output.returncode:
                    raise SystemExit(output.stderr)
                results[arm].append(json.loads(output.stdout.splitlines()[-1]))
        print(f"\n{name}: products at {median(rates) / 1e9:.0f} GFLOP/s")
        print("| arm | tokens/s | step | peak MB | of the product rate |")
        print("|---|---|---|---|---|")
        *_, rows, tokens = SHAPES[name]
        first = next(iter(results.values()))
        for arm, measured in results.items():
            seconds = median(x["seconds"] for x in measured)
            ratio = seconds / median(x["seconds"] for x in first)
            peak = median(x["peak"] for x in measured)
            rate = rows * tokens / seconds
            share = 4 * parameters(SHAPES[name]) * rate / median(rates)
            row = [arm, f"{rate:,.0f}", f"{ratio:.3f}", f"{peak:,.0f}", f"{share:.0%}"]
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
