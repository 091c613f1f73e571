"""What one process finds out and all processes of a run must know."""

import json
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np

T = TypeVar("T")


def from_first_process(function: Callable[[], T]) -> T:
    """Call `function` on process 0 only and broadcast its result, which is JSON."""
    if jax.process_count() == 1:
        return function()
    from jax.experimental.multihost_utils import broadcast_one_to_all as broadcast

    is_first = jax.process_index() == 0
    text = json.dumps(function()).encode() if is_first else b""
    size = int(broadcast(np.int32(len(text))))
    padded = np.zeros(size, np.uint8)
    padded[: len(text)] = np.frombuffer(text, np.uint8)
    return json.loads(bytes(broadcast(padded)))


def failed_processes(failed: bool) -> list[int]:
    """All-gather whether each process failed; the indices of those that did."""
    if jax.process_count() == 1:
        return [0] if failed else []
    from jax.experimental.multihost_utils import process_allgather

    return np.flatnonzero(process_allgather(np.bool_(failed))).tolist()
