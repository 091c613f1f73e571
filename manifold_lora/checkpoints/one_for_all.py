"""What one process of a run finds out and all must know, lest they part."""

import json
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np

T = TypeVar("T")


def first_process(find: Callable[[], T]) -> T:
    """What `find`, called by the first process alone, returns: JSON, in all of them."""
    if jax.process_count() == 1:
        return find()
    from jax.experimental.multihost_utils import broadcast_one_to_all as broadcast

    first = jax.process_index() == 0
    text = json.dumps(find()).encode() if first else b""
    size = int(broadcast(np.int32(len(text))))
    padded = np.zeros(size, np.uint8)
    padded[: len(text)] = np.frombuffer(text, np.uint8)
    return json.loads(bytes(broadcast(padded)))


def failing(failed: bool) -> list[int]:
    """The processes that failed; each says whether it did."""
    if jax.process_count() == 1:
        return [0] if failed else []
    from jax.experimental.multihost_utils import process_allgather

    return np.flatnonzero(process_allgather(np.bool_(failed))).tolist()
