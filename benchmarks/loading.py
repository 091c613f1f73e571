"""Time and peak host memory of loading a model onto a mesh of eight devices.

    python benchmarks/loading.py [--layers 16] [--width 1024]

A random LLaMA in bfloat16, about half a gigabyte, in one file in the page cache. Time
is a ratio of medians, with alternating repeats, over reading the file's bytes once.
Memory is the peak of NumPy's allocations on the host, without the devices' own arrays,
compared with the largest tensor times the devices of the host. Takes two minutes on two
cores.
"""

import argparse
import os
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import jax.numpy as jnp
from flax import nnx

import manifold_lora as ml
from manifold_lora.checkpoints.huggingface import hf_tensors, load_llama, save_llama
from manifold_lora.distributed.mesh import make_mesh, read_mesh

MESHES = (None, "fsdp=8", "data=4,fsdp=2", "data=2,fsdp=2,tensor=2")
REPEATS = 5


def write(path: Path, layers: int, width: int) -> tuple[int, int]:
    """Write a random model; return the bytes of all its tensors and of the largest."""
    config = ml.LlamaConfig(
        vocab_size=32000,
        hidden_size=width,
        intermediate_size=11 * width // 4,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        head_dim=64,
    )
    model = ml.Llama(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    save_llama(model, path)
    sizes = [x.nbytes for x in hf_tensors(model).values()]
    return sum(sizes), max(sizes)


def read(file: Path) -> None:
    """Read the file once, through one buffer."""
    buffer = bytearray(1 << 24)
    with file.open("rb", buffering=0) as stream:
        while stream.readinto(buffer):
            pass


def load(path: Path, text: str | None) -> None:
    """Load the model onto a mesh, or onto one device for None."""
    mesh = nullcontext() if text is None else jax.set_mesh(make_mesh(read_mesh(text)))
    with mesh:
        model = load_llama(path, jnp.bfloat16)
        jax.block_until_ready(jax.tree.leaves(nnx.state(model)))


def seconds(f: Callable[[], None]) -> float:
    """The wall-clock time of a call, in seconds."""
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def peak_bytes(f: Callable[[], None]) -> int:
    """The peak of Python's and NumPy's allocations during a call, in bytes."""
    tracemalloc.start()
    f()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


def main() -> None:
    """Print one line for one device and one for each mesh."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=1024)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model"
        total, largest = write(path, arguments.layers, arguments.width)
        print(f"{total / 1e6:.0f} MB, largest tensor {largest / 1e6:.1f} MB")
        print(f"{'mesh':24}{'load':>9}{'read':>9}{'ratio':>7}{'peak':>11}{'bound':>11}")
        for text in MESHES:
            load(path, text)  # compiles
            pairs = [
                (
                    seconds(lambda text=text: load(path, text)),
                    seconds(lambda: read(path / "model.safetensors")),
                )
                for _ in range(REPEATS)
            ]
            loading, reading = (
                statistics.median(times) for times in zip(*pairs, strict=True)
            )
            peak = peak_bytes(lambda text=text: load(path, text))
            bound = largest * (jax.local_device_count() if text else 1)
            print(
                f"{text or 'one device':24}{loading:7.2f} s{reading:7.2f} s"
                f"{loading / reading:7.1f}{peak / 1e6:8.1f} MB{bound / 1e6:8.1f} MB"
            )


if __name__ == "__main__":
    main()
