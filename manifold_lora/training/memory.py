"""How much memory a run has taken."""

import sys
from typing import Any

import jax


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
