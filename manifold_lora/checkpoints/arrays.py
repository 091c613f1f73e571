"""Arrays by name to and from a directory, by Orbax."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

# Seconds until a process that hears nothing of another one gives the writing up.
_PATIENCE = 300


def write_arrays(directory: Path, arrays: dict[str, jax.Array]) -> Callable[[], None]:
    """Copy the arrays to the host and begin to write them.

    Every process takes part, each with its own shards.

    Returns:
        What waits until all is written, and raises what went wrong.
    """
    ocp = _orbax()
    # A new one for each: after an error in its metadata one raises it for ever.
    handler = ocp.StandardCheckpointHandler()
    checkpointer = ocp.AsyncCheckpointer(handler, timeout_secs=_PATIENCE)
    # Orbax refuses arrays without entries, which there is no need to store.
    some = {name: array for name, array in arrays.items() if array.size}
    checkpointer.save(directory, args=ocp.args.StandardSave(some))
    return checkpointer.close


def read_arrays(
    directory: Path, like: dict[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """The arrays that were written, with the shardings of `like`."""
    ocp = _orbax()
    some = {name: leaf for name, leaf in like.items() if leaf.size}
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        arrays = checkpointer.restore(directory, args=ocp.args.StandardRestore(some))
    return arrays | {
        name: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
        for name, leaf in like.items()
        if not leaf.size
    }


def _orbax() -> Any:
    """Orbax, which is imported late because it is heavy, without its messages."""
    import orbax.checkpoint

    logging.getLogger("absl").addFilter(_not_of_orbax)
    return orbax.checkpoint


def _not_of_orbax(record: logging.LogRecord) -> bool:
    """It prints a traceback of every error, which it raises as well."""
    return "/orbax/checkpoint/" not in Path(record.pathname).as_posix()
