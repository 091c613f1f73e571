"""Compile time of a training step with 32 layers over 4, and import time.

    python benchmarks/compile_time.py

Prints ratios of medians, measured in one run: tracing and XLA compilation of the whole
step (forward, backward, Stiefel-LoRA update); `import manifold_lora` with the names a
script needs over `import jax, optax`; and `manifold-lora --help`.
"""

import statistics
import subprocess
import sys
import time

import jax
import numpy as np
from flax import nnx

import manifold_lora as ml
from manifold_lora.adapters import axes, split
from manifold_lora.training.step import TrainState, make_step

REPEATS = 5


def step_times(layers: int) -> tuple[float, float]:
    """Seconds to trace and to compile the step of a model with that many layers."""
    config = ml.LlamaConfig(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
    )
    model = ml.Llama(config, rngs=nnx.Rngs(0))
    ml.attach(model, ml.AdapterConfig("stiefel", rank=8))
    rebuild, factors, frozen = split(model)
    tags = ml.manifold_tree(model)
    tx = ml.stiefel_lora(0.1, tags)
    state = TrainState(factors, jax.jit(tx.init)(factors), jax.random.key(0))
    ones = np.ones((2, 128), np.int32)
    batch = {name: ones for name in ("input_ids", "positions", "segment_ids")}
    batch |= {"loss_mask": ones.astype(np.float32)}
    step = jax.jit(make_step(rebuild, tx, tags, axes(model)))
    start = time.perf_counter()
    lowered = step.lower(state, frozen, batch)
    traced = time.perf_counter()
    lowered.compile()
    return traced - start, time.perf_counter() - traced


def process_time(*arguments: str) -> float:
    """Wall-clock seconds of a new Python process."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    """Measure in alternation, so that drift affects all cases alike."""
    times: dict[str, list[float]] = {}

    def record(name: str, seconds: float) -> None:
        times.setdefault(name, []).append(seconds)

    imports = "import manifold_lora as ml; ml.Stiefel, ml.riemannian, ml.stiefel_lora"
    show_help = "import sys; from manifold_lora.cli.main import main; main(['--help'])"
    for _ in range(REPEATS):
        for layers in (4, 32):
            traced, compiled = step_times(layers)
            record(f"trace, {layers} layers", traced)
            record(f"compile, {layers} layers", compiled)
        record("import jax, optax", process_time("-c", "import jax, optax"))
        record("import manifold_lora", process_time("-c", "import manifold_lora"))
        record("import manifold_lora and use it", process_time("-c", imports))
        record("manifold-lora --help", process_time("-c", show_help))

    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, median in medians.items():
        print(f"{name:36} {median:7.2f} s")

    def ratio(label: str, over: str, under: str) -> None:
        print(f"{label:36} {medians[over] / medians[under]:7.2f} ×")

    ratio("compile, 32 over 4 layers", "compile, 32 layers", "compile, 4 layers")
    ratio("trace, 32 over 4 layers", "trace, 32 layers", "trace, 4 layers")
    plain = "import jax, optax"
    ratio("import over jax, optax", "import manifold_lora", plain)
    ratio("import and use over jax, optax", "import manifold_lora and use it", plain)


if __name__ == "__main__":
    main()
