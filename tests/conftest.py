"""Settings of all tests."""

import os
import tempfile

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiled in a fraction of the time, for programs whose speed is nothing.
_QUICK = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count=8 {_QUICK}")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "agg")
# One program is compiled once for all tests that need it. Set before JAX is imported.
_CACHE = tempfile.TemporaryDirectory()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _CACHE.name)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


@pytest.fixture(autouse=True)
def one_device(request, monkeypatch):
    """Runs take one of the eight devices, but in tests marked `mesh`."""
    if "mesh" in request.keywords:
        return
    import jax

    from manifold_lora.distributed import mesh

    monkeypatch.setattr(mesh, "all_devices", lambda: jax.devices()[:1])


@pytest.fixture
def quick_compilation():
    """Compiles in half of the time, for programs whose speed is nothing."""
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
