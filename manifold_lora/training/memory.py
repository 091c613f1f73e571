"""How much memory there is, and how much a program or a run takes."""

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

_LIMIT_OF_CONTAINER = Path("/sys/fs/cgroup/memory.max")


def peak_memory() -> int | None:
    """The peak in bytes: of the first device, or of the process where that is the host.

    None where neither is known.
    """
    statistics: Any = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in statistics:
        return int(statistics["peak_bytes_in_use"])
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def device_memory() -> int | None:
    """Bytes that there are for each device, the least of all processes; None: unknown.

    Of a CPU that is the memory of the machine or of its container, in equal parts.
    """
    statistics: Any = jax.local_devices()[0].memory_stats() or {}
    limit = statistics.get("bytes_limit")
    if limit is None and jax.default_backend() == "cpu":
        limit = _host_memory() // jax.local_device_count()
    everywhere = multihost_utils.process_allgather(np.array(limit or 0))
    return int(np.min(everywhere)) or None


def _host_memory() -> int:
    limits = []
    with contextlib.suppress(OSError, ValueError):  # "max": no limit
        limits.append(int(_LIMIT_OF_CONTAINER.read_text()))
    with contextlib.suppress(AttributeError, OSError, ValueError):  # not on Windows
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(limits, default=0)


def program_memory(compiled: Any) -> int:
    """Bytes that a compiled program needs on each device, with its arguments."""
    analysis = compiled.memory_analysis()
    return (
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
        + analysis.temp_size_in_bytes
        + analysis.generated_code_size_in_bytes
    )
