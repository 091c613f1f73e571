"""Settings of all tests."""

import os
from pathlib import Path

import pytest

from tests import command
from tests.compilation import cache_directory, xla_flags

# Set before JAX is imported, and inherited by the tests' own processes.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", xla_flags(devices=8))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "agg")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = cache_directory()
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


@pytest.fixture(autouse=True)
def no_processes_left():
    """The command's processes end with their test."""
    yield
    command.kill_all()


@pytest.fixture(autouse=True)
def blank_pictures(request, monkeypatch):
    """Pictures are written without being drawn, but in tests marked `pictures`."""
    if "pictures" in request.keywords:
        return
    from matplotlib.figure import Figure

    def save(figure, path, **options):
        Path(path).write_bytes(b"\x89PNG")

    monkeypatch.setattr(Figure, "savefig", save)


@pytest.fixture
def quick_compilation():
    """Compiles in half of the time, for programs whose speed does not matter."""
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
