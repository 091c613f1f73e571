"""How the tests' programs are compiled: quickly, and once for all runs."""

import os
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from packaging.version import Version

from manifold_lora.cli.compile_cache import processor

# A fifth of the time to compile, for programs whose speed does not matter.
QUICK: dict[str, Any] = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_parallel_codegen_split_count": 1,  # the programs are small
}
if Version(version("jaxlib")) < Version("0.11.1"):
    # Newer XLA has no such option, and ends a process that asks for it.
    QUICK["xla_cpu_use_fusion_emitters"] = False


def xla_flags(devices: int) -> str:
    """The XLA_FLAGS for this number of CPU devices, with quick compilation."""
    flags = {"xla_force_host_platform_device_count": devices} | QUICK
    return " ".join(f"--{name}={str(value).lower()}" for name, value in flags.items())


def cache_directory() -> str:
    """JAX's persistent compilation cache, kept between runs of the tests.

    There is one for each version of JAX and kind of processor, in the user's cache
    directory. It may be deleted at any time; JAX_COMPILATION_CACHE_DIR names another.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = f"jax-{version('jax')}-{processor()}"
    directory = root / "manifold-lora-tests" / name
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:  # a home that is missing or read-only
        return tempfile.mkdtemp(prefix="manifold-lora-tests-")
    return str(directory)
