"""Kill a run at random moments; measure the time and size of checkpoints.

    python benchmarks/resume.py --kills 50      # about 15 minutes
    python benchmarks/resume.py --kills 0       # the costs only

A run of the command on a small base is killed by SIGKILL at times drawn uniformly from
its duration, from the start of the interpreter to its exit. Each killed run is started
again and must end with the same adapter as an uninterrupted run, bit for bit.
"""

import io
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import tyro
from rich.console import Console

from manifold_lora.checkpoints.store import CheckpointStore
from manifold_lora.configuration.parts import OutputConfig
from manifold_lora.training import train as training
from manifold_lora.training.config import TrainConfig

CODE = "from manifold_lora.cli.main import main; main()"
ADAPTER = Path("adapter/adapter_model.safetensors")


def start(out: Path, cache: Path) -> subprocess.Popen[bytes]:
    """Start a run on the built-in base and data: 60 steps, a checkpoint every 5."""
    arguments = "--steps 60 --eval-every 20 --checkpoint-every 5 --eval-examples 64"
    return subprocess.Popen(
        [sys.executable, "-c", CODE, "train", *arguments.split(), "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        # compiled once: every run has the same programs
        env=os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)},
    )


def finish(process: subprocess.Popen[bytes]) -> None:
    """Wait for a run that must succeed."""
    output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(output.decode())


def kill(folder: Path, kills: int, seed: int) -> None:
    """Kill runs, resume them, and compare their adapters."""
    rng = random.Random(seed)
    cache = folder / "cache"
    for name in ("warm", "uninterrupted"):  # the second one compiles nothing
        started = time.perf_counter()
        finish(start(folder / name, cache))
    duration = time.perf_counter() - started
    needed = (folder / "uninterrupted" / ADAPTER).read_bytes()
    same = resumed = 0
    for number in range(kills):
        out, delay = folder / f"run{number}", rng.uniform(0, duration)
        process = start(out, cache)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        resumed += any(out.glob("checkpoints/*/manifest.json"))
        finish(start(out, cache))
        same += (out / ADAPTER).read_bytes() == needed
        print(f"kill {number + 1} after {delay:.2f} s: {same} equal", flush=True)
    print(f"{same} of {kills} equal bit for bit; {resumed} resumed from a checkpoint")


def costs(folder: Path) -> None:
    """Measure the time and size of the checkpoints of the default run."""
    blocked: list[float] = []
    steps: list[float] = []
    make_step = training.make_step

    def timed(function: Callable[..., Any], durations: list[float]) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            result = jax.block_until_ready(function(*arguments, **options))
            durations.append(time.perf_counter() - started)
            return result

        return call

    def make_timed_step(*arguments: Any) -> Any:
        return timed(make_step(*arguments), steps)

    CheckpointStore.save = timed(CheckpointStore.save, blocked)
    training.make_step = make_timed_step
    config = TrainConfig(output=OutputConfig(out=folder / "costs"))
    training.train(config, Console(file=io.StringIO()))
    checkpoint = max(config.run_directory.glob("checkpoints/*"))
    size = sum(f.stat().st_size for f in checkpoint.rglob("*") if f.is_file())
    factors = 4 * 155_648  # bytes: the default run's, in float32
    print(
        f"{len(blocked)} checkpoints in {len(steps)} steps: "
        f"{sum(blocked) / sum(steps[1:]):.2%} of the steps' time; median "
        f"{statistics.median(blocked) * 1e3:.0f} ms per checkpoint, "
        f"{statistics.median(steps) * 1e3:.0f} ms per step; "
        f"{size / factors:.2f} × the factors"
    )


def main(kills: int = 50, seed: int = 0) -> None:
    """Measure the costs, then kill and resume runs."""
    print(f"jax {jax.__version__}, {os.cpu_count()} CPUs")
    with tempfile.TemporaryDirectory() as folder:
        costs(Path(folder))
        if kills:
            kill(Path(folder), kills, seed)


if __name__ == "__main__":
    tyro.cli(main)
