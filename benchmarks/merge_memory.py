"""Peak host memory and time of merging an adapter into a model directory.

    python benchmarks/merge_memory.py MODEL [--rank 16]

MODEL is a Hugging Face directory, such as that of SmolLM2-135M. A random adapter of all
linear layers is merged into it, in a process of its own: the peak of its resident
memory, above what it has after all imports and the start of JAX, over the size of the
model's files. The second row includes reading the written model back and comparing
logits, in blocks of rows. Linux only. Takes half a minute on two cores.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import jax
import numpy as np

import manifold_lora as ml
from manifold_lora.conversion import merge
from manifold_lora.conversion.base import Base
from manifold_lora.conversion.probe import Difference
from manifold_lora.conversion.updates import Update, as_adapter
from manifold_lora.conversion.write import write_adapter


def write_random_adapter(model: Path, out: Path, rank: int) -> None:
    """A LoRA adapter of all linear layers with random factors."""
    rng = np.random.default_rng(0)
    updates = {}
    base = Base.open(model)
    for name, stored in base.tensors.items():
        if not name.endswith("_proj.weight"):
            continue
        outputs, inputs = stored.shape
        a = rng.normal(size=(rank, inputs)) / np.sqrt(inputs)
        b = rng.normal(size=(outputs, rank)) / 100
        update = Update(a.astype(np.float32), b.astype(np.float32), 1.0)
        updates[name.removesuffix(".weight")] = update
    write_adapter(out, as_adapter(updates)._replace(base=base.fingerprint()))


def status(key: str) -> int:
    """A number of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def measure(model: Path, adapter: Path, out: Path, read_back: bool) -> None:
    """Merge, and print the bytes above the baseline and the seconds."""
    jax.block_until_ready(jax.numpy.zeros(8) + 1)  # XLA starts here
    same = mock.patch.object(merge, "compare_logits", lambda *_: Difference(0, 1))
    config = ml.MergeConfig(model=model, adapters=(str(adapter),), out=out)
    before, start = status("VmRSS"), time.perf_counter()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    if read_back:
        ml.merge_files(config)
    else:
        with same:
            ml.merge_files(config)
    seconds = time.perf_counter() - start
    print(status("VmHWM") - before, seconds)


def main() -> None:
    """Run both measurements and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        adapter, out, read_back = arguments.measure
        measure(arguments.model, Path(adapter), Path(out), read_back == "yes")
        return
    size = sum(file.stat().st_size for file in arguments.model.glob("*.safetensors"))
    print(f"model {size / 2**20:.0f} MiB, rank {arguments.rank}")
    print("what                      peak MiB  over the model   seconds")
    with tempfile.TemporaryDirectory() as directory:
        adapter = Path(directory) / "adapter"
        write_random_adapter(arguments.model, adapter, arguments.rank)
        for name, read_back in (("merge", "no"), ("merge and read back", "yes")):
            command = [sys.executable, __file__, str(arguments.model), "--measure"]
            command += [str(adapter), str(Path(directory) / name), read_back]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            peak, seconds = map(float, done.stdout.split()[-2:])
            print(f"{name:25} {peak / 2**20:8.0f} {peak / size:15.3f} {seconds:9.1f}")


if __name__ == "__main__":
    main()
