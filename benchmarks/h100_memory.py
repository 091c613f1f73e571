"""Memory of a training step on an H100, compiled for it without a GPU.

    python benchmarks/h100_memory.py [CASE ...]

XLA compiles for a described GPU as for a TPU. Each case prints the peak of the program,
and the attention kernels that it calls. Needs `pip install jax[cuda12]`, but no driver;
a case takes up to a minute.
"""

import argparse
import os
import re
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # there is no driver to ask

import jax
from jax.experimental import topologies

from manifold_lora.adapters import AdapterConfig
from manifold_lora.configuration.parts import BatchConfig, ModelConfig
from manifold_lora.distributed.mesh import make_mesh
from manifold_lora.models.shapes import model_shape
from manifold_lora.planning import abstract
from manifold_lora.training.config import TrainConfig
from manifold_lora.training.memory import program_memory

# An H100 SXM as XLA's own description of targets has it.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072 registers_per_core_limit: 65536
  registers_per_block_limit: 65536 cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@dataclass(frozen=True)
class Case:
    """A step of `stiefel` in bfloat16."""

    model: str
    rows: int
    tokens: int
    remat: Any
    packed: bool = False
    base_dtype: Any = None


CASES = {
    "1b dots": Case("llama-3.2-1b", 8, 1024, "dots"),
    "1b dots packed": Case("llama-3.2-1b", 8, 1024, "dots", packed=True),
    "8b none": Case("llama-3.1-8b", 2, 4096, "none"),
    "8b dots": Case("llama-3.1-8b", 2, 4096, "dots"),
    "8b block": Case("llama-3.1-8b", 2, 4096, "block"),
    "8b block packed": Case("llama-3.1-8b", 2, 4096, "block", packed=True),
    "8b block nf4": Case("llama-3.1-8b", 2, 4096, "block", base_dtype="nf4"),
}


def compiled(case: Case, device: Any) -> Any:
    """The compiled training step of a case."""
    config = TrainConfig(
        model=ModelConfig(Path(case.model), "bfloat16", case.base_dtype),
        adapter=AdapterConfig("stiefel", rank=16),
        batch=BatchConfig(case.rows, 1, case.tokens),
    )
    model = abstract.abstract_model(config, model_shape(Path(case.model)))
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, [device])
    make_step = abstract.make_step
    abstract.make_step = partial(make_step, packed=case.packed)
    try:
        run = abstract.abstract_run(config, model, mesh, case.remat)
    finally:
        abstract.make_step = make_step
    return run.traced().lower().compile()


def main() -> None:
    """Print a row for each case."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cases", nargs="*", default=[*CASES])
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    topology = topologies.get_topology_desc(
        "", platform="cuda", topology="1x1x1", target_config=H100
    )
    print("| case | peak, GiB | compile, s | kernels |\n|---|---|---|---|")
    for name in options.cases:
        started = time.perf_counter()
        program = compiled(CASES[name], topology.devices[0])
        seconds = time.perf_counter() - started
        calls = re.findall(r'custom_call_target="([^"]+)"', program.as_text())
        kernels = ", ".join(
            f"{count} × {call}" for call, count in Counter(calls).items()
        )
        peak = program_memory(program) / 2**30
        print(f"| {name} | {peak:.2f} | {seconds:.0f} | {kernels} |", flush=True)


if __name__ == "__main__":
    main()
