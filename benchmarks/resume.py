"""Kill a run at random moments, and what checkpoints cost: time and bytes.

    python benchmarks/resume.py --kills 50      # about a quarter of an hour
    python benchmarks/resume.py --kills 0       # the costs only

A run of the command on a small base is killed by SIGKILL at moments drawn from its
whole duration, from the start of the interpreter to its end; each killed run is
restarted and must end with the adapter of an uninterrupted run, bit for bit.
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

from manifold_lora.checkpoints import resume
from manifold_lora.configuration.parts import OutputConfig
from manifold_lora.training import train as training
from manifold_lora.training.config import TrainConfig

CODE = "from manifold_lora.cli.main import main; main()"
ADAPTER = Path("adapter/adapter_model.safetensors")


def start(out: Path, cache: Path) -> subprocess.Popen[bytes]:
    """The run: the built-in base and data, 60 steps, a checkpoint every 5."""
    arguments = "--steps 60 --eval-every 20 --checkpoint-every 5 --eval-examples 64"
    return subprocess.Popen(
        [sys.executable, "-c", CODE, "train", *arguments.split(), "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        # compiled once; programs are the same in every run
        env=os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)},
    )


def end(process: subprocess.Popen[bytes]) -> None:
    """Wait for a run that must succeed."""
    output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(output.decode())


def kill(folder: Path, kills: int, seed: int) -> None:
    """Kill runs at random moments, resume them, and compare."""
    rng = random.Random(seed)
    cache = folder / "cache"
    for name in ("warm", "whole"):  # the second finds everything compiled
        began = time.perf_counter()
        end(start(folder / name, cache))
    duration = time.perf_counter() - began
    needed = (folder / "whole" / ADAPTER).read_bytes()
    same = resumed = 0
    for number in range(kills):
        out, moment = folder / f"run{number}", rng.uniform(0, duration)
        process = start(out, cache)
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        resumed += any(out.glob("checkpoints/*/manifest.json"))
        end(start(out, cache))
        same += (out / ADAPTER).read_bytes() == needed
        print(f"kill {number + 1} after {moment:.2f} s: {same} equal", flush=True)
    print(f"{same} of {kills} bit for bit; {resumed} of them from a checkpoint")


def costs(folder: Path) -> None:
    """Time and bytes of the checkpoints of the default run."""
    blocked: list[float] = []
    steps: list[float] = []
    make_step = training.make_step

    def timed(function: Callable[..., Any], durations: list[float]) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            result = jax.block_until_ready(function(*arguments, **options))
            durations.append(time.perf_counter() - began)
            return result

        return call

    def make_timed_step(*arguments: Any) -> Any:
        return timed(make_step(*arguments), steps)

    resume.Checkpoints.save = timed(resume.Checkpoints.save, blocked)
    training.make_step = make_timed_step
    config = TrainConfig(output=OutputConfig(out=folder / "costs"))
    training.train(config, Console(file=io.StringIO()))
    checkpoint = max(config.run_directory.glob("checkpoints/*"))
    size = sum(f.stat().st_size for f in checkpoint.rglob("*") if f.is_file())
    factors = 4 * 155_648  # of the default run, float32
    print(
        f"{len(blocked)} checkpoints in {len(steps)} steps: "
        f"{sum(blocked) / sum(steps[1:]):.2%} of the steps' time, median "
        f"{statistics.median(blocked) * 1e3:.0f} ms beside steps of "
        f"{statistics.median(steps) * 1e3:.0f} ms; {size / factors:.2f} × the factors"
    )


def main(kills: int = 50, seed: int = 0) -> None:
    """Costs first, then the kills."""
    print(f"jax {jax.__version__}, {os.cpu_count()} CPUs")
    with tempfile.TemporaryDirectory() as folder:
        costs(Path(folder))
        if kills:
            kill(Path(folder), kills, seed)


if __name__ == "__main__":
    tyro.cli(main)
