"""The directory where compiled programs are kept between runs."""

import hashlib
import os
import platform
from pathlib import Path

import platformdirs

_VARIABLE = "JAX_COMPILATION_CACHE_DIR"
# JAX's own limit is a second; a run has some fifty small programs below it.
_LEAST = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"


def use_compile_cache() -> None:
    """Have JAX keep what it compiles in the user's cache directory.

    To be called before JAX is imported. A directory that `JAX_COMPILATION_CACHE_DIR`
    names is left as it is. JAX keeps programs by their content, device, flags and its
    own version, so that none is stale. The directory may be deleted at any time; one
    that cannot be made is not used.
    """
    if _VARIABLE in os.environ:
        return
    directory = platformdirs.user_cache_path("manifold-lora") / f"jax-{processor()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:  # a home that is missing or read-only
        return
    os.environ[_VARIABLE] = str(directory)
    os.environ.setdefault(_LEAST, "0")


def processor() -> str:
    """A short hash of the instruction set that programs are compiled for.

    Machines that share a home directory may differ in it, and a program of one may
    crash another.
    """
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    flags = [line for line in lines if line.startswith(("flags", "Features"))]
    text = flags[0] if flags else platform.processor() + platform.machine()
    return hashlib.sha256(text.encode()).hexdigest()[:8]
