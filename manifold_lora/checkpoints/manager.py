"""Orbax's `CheckpointManager`, set up for the checkpoints of a training run."""

import logging
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from manifold_lora.errors import InputError

if TYPE_CHECKING:
    from orbax.checkpoint import CheckpointManager

ITEM = "state"  # the directory of the arrays in that of a step
# Seconds until a process gives up a write in which another one does not take part.
_TIMEOUT = 300


class BestOfLatest:
    """Preserve the checkpoints that were the best when the latest were written.

    An Orbax preservation policy, where its `BestN(n=1)` does not do: that keeps only
    what is best now, and the latest of equal ones. Should the newest checkpoint turn
    out corrupt, the run resumes from the one before and needs what was best then.

    Args:
        count: the number of latest checkpoints.
        best_steps: for each checkpoint the step that was the best at its time.
    """

    def __init__(self, count: int, best_steps: Mapping[int, int]):
        self._count, self._best_steps = count, best_steps

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        """Whether to preserve each of the checkpoints, which are in order."""
        del context
        latest = checkpoints[-self._count :]
        best = {self._best_steps.get(info.step) for info in latest}
        return [info.step in best for info in checkpoints]


class PlainPath:
    """A path to a directory without characters that Orbax takes for a pattern.

    Orbax reads brackets and backslashes of a path as a pattern when it merges the parts
    of a checkpoint, and colons as a scheme. Such a directory gets a symbolic link in a
    temporary one.

    Args:
        directory: which need not exist yet.

    Attributes:
        path: the directory itself, or the link.

    Raises:
        InputError: temporary directories have such characters as well.
    """

    def __init__(self, directory: Path):
        self.path, self._folder = directory, None
        if not self._is_plain():
            self._folder = tempfile.TemporaryDirectory(prefix="manifold-lora-")
            self.path = Path(self._folder.name, "checkpoints")
            self.path.symlink_to(directory, target_is_directory=True)
            if not self._is_plain():
                self.close()
                raise InputError(
                    f"checkpoints need a temporary directory whose path has letters "
                    f"and digits only, got {self._folder.name}: set TMPDIR to one."
                )

    def _is_plain(self) -> bool:
        plain = r"[\w\s/.,+=@%~#&$;!()'\"-]*"
        return re.fullmatch(plain, str(self.path)) is not None

    def close(self) -> None:
        """Remove the link."""
        if self._folder is not None:
            self._folder.cleanup()


def open_manager(
    directory: Path, count: int, best_steps: Mapping[int, int]
) -> "CheckpointManager":
    """A manager that writes in the background, and preserves the latest and the best.

    Args:
        directory: holds a directory per step.
        count: the number of latest checkpoints to preserve.
        best_steps: see `BestOfLatest`.
    """
    import orbax.checkpoint as ocp  # heavy, so not at the top
    from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, LatestN

    class Manager(ocp.CheckpointManager):
        # Orbax asks again, for the step that it wrote, from its background thread.
        # JAX takes that for the progress of this process, and may then have all
        # processes stop after a step that this one has passed. The training loop asks.
        def reached_preemption(self, step: int) -> bool:
            del step
            return False

    logging.getLogger("absl").addFilter(_is_not_from_orbax)
    policies = [LatestN(count), BestOfLatest(count, best_steps)]
    options = ocp.CheckpointManagerOptions(
        create=False,
        save_root_metadata=False,
        single_host_load_and_broadcast=True,
        lightweight_initialize=True,
        preservation_policy=AnyPreservationPolicy(policies),
        async_options=ocp.options.AsyncOptions(timeout_secs=_TIMEOUT),
    )
    return Manager(directory, options=options)


def save_arrays(
    manager: "CheckpointManager", step: int, arrays: dict[str, jax.Array]
) -> None:
    """Copy the arrays to the host and start to write them, each process its shards."""
    import orbax.checkpoint as ocp

    # Orbax refuses arrays without entries, which need not be stored.
    stored = {name: array for name, array in arrays.items() if array.size}
    items = ocp.args.Composite(**{ITEM: ocp.args.StandardSave(stored)})
    manager.save(step, args=items, force=True)  # when to save is up to the caller


def restore_arrays(
    manager: "CheckpointManager", step: int, like: dict[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """The arrays of a step, with the shardings of `like`."""
    import orbax.checkpoint as ocp

    stored = {name: leaf for name, leaf in like.items() if leaf.size}
    items = ocp.args.Composite(**{ITEM: ocp.args.StandardRestore(stored)})
    return manager.restore(step, args=items)[ITEM] | {
        name: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
        for name, leaf in like.items()
        if not leaf.size
    }


def _is_not_from_orbax(record: logging.LogRecord) -> bool:
    """Orbax logs a traceback of every error, which it raises as well."""
    return "/orbax/checkpoint/" not in Path(record.pathname).as_posix()
