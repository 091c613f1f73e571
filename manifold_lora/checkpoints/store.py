"""Checkpoints of a training run, from which it resumes after any interruption.

Orbax's `CheckpointManager` writes, replaces and deletes them. Each is a directory named
by its step: Orbax's files of the arrays in `state/`, everything else that the run needs
in `run.json`, and last of all `manifest.json` with the size and hash of every other
file (`manifest.py`). One without a manifest is unfinished and does not count.
"""

import contextlib
import errno
import json
import os
import re
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import msgspec

from manifold_lora.checkpoints.atomic import write_text
from manifold_lora.checkpoints.collectives import failed_processes, from_first_process
from manifold_lora.checkpoints.leaves import (
    abstract_leaf,
    data_to_key,
    describe_leaf,
    key_to_data,
    named_leaves,
)
from manifold_lora.checkpoints.manager import (
    ITEM,
    PlainPath,
    open_manager,
    restore_arrays,
    save_arrays,
)
from manifold_lora.checkpoints.manifest import MANIFEST, find_damage, write_manifest
from manifold_lora.errors import InputError

if TYPE_CHECKING:
    from orbax.checkpoint import CheckpointManager

RUN = "run.json"
REQUIRED = (RUN, f"{ITEM}/manifest.ocdbt", f"{ITEM}/_METADATA")  # of a checkpoint
UNFINISHED = ".orbax-checkpoint-tmp"  # how Orbax ends the name of what it writes


class CheckpointError(OSError):
    """A checkpoint could not be written; the last finished one is intact."""


class CorruptCheckpointError(InputError):
    """A checkpoint is missing, or is not what was written."""


class Restored(NamedTuple):
    """The contents of a checkpoint."""

    step: int
    state: Any
    progress: dict[str, Any]


class CheckpointStore:
    """The checkpoints of one run in one directory, written in the background.

    Every process of the run makes one and calls the same methods in the same order.
    A context manager, at whose end everything is on disk.

    Args:
        directory: where they are; created with the first of them.
        identity: what must be the same for a run to resume from a checkpoint, as JSON.
        keep: number of recent checkpoints to keep, in addition to the best one.
    """

    skipped: list[str]  # what `restore_latest` found corrupt: path and reason

    def __init__(self, directory: Path, *, identity: dict[str, Any], keep: int = 2):
        self.skipped = []
        self._directory = directory.absolute()
        self._plain = PlainPath(self._directory)
        self._identity = json.loads(json.dumps(identity))
        self._keep = keep
        self._corrupt: set[int] = set()
        self._best_steps: dict[int, int] = {}
        self._manager: CheckpointManager | None = None
        # Orbax has no hook between its commit of a step and the end of the save, so
        # the manifest needs a thread of its own.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._pending: Future[None] | None = None

    @property
    def steps(self) -> list[int]:
        """The steps of the finished checkpoints on disk."""
        return sorted(
            int(path.parent.name)
            for path in self._directory.glob(f"*/{MANIFEST}")
            if path.parent.name.isdecimal()
        )

    def save(
        self, step: int, state: Any, progress: dict[str, Any], *, best_step: int
    ) -> None:
        """Copy the state to the host and write it in the background.

        The arrays may be donated as soon as this returns. A step that is intact on
        disk is not written again. When the new checkpoint is finished, older ones are
        deleted except the most recent and those that were best at the time of these;
        later ones, which the run did not resume from, are deleted before.

        Args:
            step: number of steps taken.
            state: any tree of JAX arrays, typed PRNG keys among them.
            progress: everything else that the run needs, as JSON; NaN and infinity too.
            best_step: the step whose checkpoint is kept as long as this one is.

        Raises:
            CheckpointError: an earlier one could not be written, and nothing of this
                step is; or writing this one cannot even start. A later call retries.
        """
        self.wait()
        leaves = named_leaves(state)
        run = {
            "step": step,
            "identity": self._identity,
            "progress": progress,
            "best_step": best_step,
            "leaves": {name: describe_leaf(leaf) for name, leaf in leaves.items()},
        }
        text = json.dumps(run, indent=1)
        arrays = {name: key_to_data(leaf) for name, leaf in leaves.items()}
        size = sum(array.nbytes for array in arrays.values())
        intact, error, deleted = from_first_process(lambda: self._prepare(step, size))
        if deleted:
            self._manager = None  # it has a list of what is on disk
        if intact:
            return
        if error:
            raise CheckpointError(_cannot_write(self._path(step), error))
        self._corrupt.clear()
        manager = self._open()
        self._best_steps[step] = best_step
        save_arrays(manager, step, arrays)
        self._pending = self._thread.submit(self._finish, manager, step, text)

    def _path(self, step: int) -> Path:
        return self._directory / str(step)

    def _prepare(self, step: int, size: int) -> tuple[bool, str, bool]:
        """Make room for a step, on process 0.

        Returns:
            Whether it is intact on disk, so that there is nothing to do; what prevents
            it from being written; whether another one was deleted.
        """
        path, deleted = self._path(step), False
        if step not in self._corrupt and not find_damage(path, REQUIRED):
            return True, "", False
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            valid = {str(other) for other in self.steps if other < step}
            valid -= {str(other) for other in self._corrupt}
            for other in self._directory.iterdir():
                number = other.name.removesuffix(UNFINISHED)
                if number.isdecimal() and other.is_dir() and other.name not in valid:
                    _delete(other)
                    deleted = True
            if path.exists():
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
            # Checked here because Orbax, once it has started, does not fail cleanly.
            free = shutil.disk_usage(self._directory).free
            if free < size:
                message = f"{os.strerror(errno.ENOSPC)}: {size} bytes needed"
                raise OSError(f"{message}, {free} free")
        except OSError as error:
            return False, str(error), deleted
        return False, "", deleted

    def _open(self) -> "CheckpointManager":
        """The manager, made on first use."""
        if self._manager is None:
            self._best_steps = dict(from_first_process(self._read_best_steps))
            # Orbax deletes old checkpoints before the new one has its manifest. So it
            # always leaves the one before as well; see `_delete_previous`.
            count = max(self._keep, 2)
            self._manager = open_manager(self._plain.path, count, self._best_steps)
        return self._manager

    def _read_best_steps(self) -> list[tuple[int, int]]:
        pairs = []
        for step in self.steps:
            # a corrupt one is reported when it is to be restored
            with contextlib.suppress(OSError, ValueError):
                pairs.append((step, _read_run(self._path(step)).best_step))
        return pairs

    def _finish(self, manager: "CheckpointManager", step: int, text: str) -> None:
        """Wait until Orbax has committed the step and add our files."""
        path = self._path(step)
        try:
            manager.wait_until_finished()
            if jax.process_index() == 0:
                _check_merged(path)
                write_text(path / RUN, text)
                write_manifest(path)
        except Exception as error:
            if jax.process_index() == 0 and not (path / MANIFEST).exists():
                _delete(path)  # makes room on a full disk
                _delete(path.with_name(f"{step}{UNFINISHED}"))
            raise CheckpointError(_cannot_write(path, error)) from error

    def wait(self) -> None:
        """Wait until everything is on disk.

        Raises:
            CheckpointError: it could not be written.
        """
        if self._pending is None:
            return
        error = self._pending_error()
        if failed := failed_processes(error is not None):
            self._manager = None  # after an error Orbax's raises it again and again
            raise error or CheckpointError(
                f"Process {failed[0]} could not write its shards of a checkpoint in "
                f"{self._directory}; its own message says why."
            )
        if self._keep == 1:
            self._delete_previous()

    def _pending_error(self) -> BaseException | None:
        """The error of the last write, once that has ended."""
        pending, self._pending = self._pending, None
        return pending.exception() if pending else None

    def _delete_previous(self) -> None:
        """With `keep=1`: delete what had to stay until there was a manifest."""
        manager = self._open()
        latest = max(manager.all_steps())
        for step in set(manager.all_steps()) - {latest, self._best_steps[latest]}:
            manager.delete(step)

    def restore_latest(self, like: Any) -> Restored | None:
        """The newest intact checkpoint; None if none was ever finished.

        Corrupt ones are skipped and listed in `skipped`.

        Args:
            like: a tree as the state was saved, of arrays or `jax.ShapeDtypeStruct`s,
                whose shardings say where the arrays go. They need not be those that
                the state was saved with, nor the number of processes.

        Raises:
            InputError: all are corrupt, or it belongs to another run.
        """
        self.wait()
        self.skipped = []
        for step in reversed(from_first_process(lambda: self.steps)):
            try:
                return self.restore(step, like)
            except CorruptCheckpointError as error:
                self._corrupt.add(step)
                self.skipped.append(str(error))
        if self.skipped:
            raise InputError(
                "No checkpoint of this run can be used:\n  "
                + "\n  ".join(self.skipped)
                + "\nRestore one from a backup, or give --overwrite to restart."
            )
        return None

    def restore(self, step: int, like: Any) -> Restored:
        """The checkpoint of one step; `restore_latest` describes `like`.

        Raises:
            CorruptCheckpointError: it is missing or corrupt; the message says how.
            InputError: it belongs to another run.
        """
        self.wait()
        path = self._path(step)
        damage, content = from_first_process(lambda: _read_intact(path, step))
        if damage:
            raise CorruptCheckpointError(f"{path}: {damage}")
        run = msgspec.convert(content, _Run)
        if differences := _differences(run.identity, self._identity):
            raise InputError(
                f"The checkpoint {path} belongs to another run: {differences}. Choose "
                "another --out, or give --overwrite to restart."
            )
        leaves = named_leaves(like)
        needed = {name: describe_leaf(leaf) for name, leaf in leaves.items()}
        if differences := _differences(run.leaves, needed):
            raise InputError(
                f"The arrays of the checkpoint {path} are not those of this run: "
                f"{differences}. Run with the configuration it was saved with, choose "
                "another --out, or give --overwrite to restart."
            )
        manager, arrays, error = self._open(), {}, None
        try:
            abstract = {name: abstract_leaf(leaf) for name, leaf in leaves.items()}
            arrays = restore_arrays(manager, step, abstract)
        except Exception as caught:  # whatever Orbax makes of files it does not like
            error = caught
        if failed := failed_processes(error is not None):
            reason = _reason(error) if error else f"see process {failed[0]}"
            raise CorruptCheckpointError(f"{path}: cannot be read: {reason}") from error
        state = [data_to_key(leaf, arrays[name]) for name, leaf in leaves.items()]
        tree = jax.tree.structure(like)
        return Restored(step, jax.tree.unflatten(tree, state), run.progress)

    def close(self) -> None:
        """Wait as `wait` does, and release the threads."""
        try:
            self.wait()
            if self._manager is not None:
                self._manager.close()
        finally:
            self._thread.shutdown()
            self._plain.close()

    def __enter__(self) -> "CheckpointStore":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None:
            return self.close()
        # What ended the block is what matters. Other processes, which a write waits
        # for, may be gone.
        if jax.process_count() == 1 and (failure := self._pending_error()):
            error.add_note(str(failure))
        self._thread.shutdown(wait=jax.process_count() == 1)
        if jax.process_count() == 1:
            self._plain.close()


class _Run(msgspec.Struct):
    """The content of run.json."""

    identity: dict[str, Any]
    progress: dict[str, Any]
    best_step: int
    leaves: dict[str, str]
    step: int | None = None  # earlier files do not say


def _read_run(path: Path) -> _Run:
    # Not msgspec's decoder: a loss may be NaN.
    try:
        content = json.loads((path / RUN).read_text("utf-8"))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    return msgspec.convert(content, _Run)


def _read_intact(path: Path, step: int) -> tuple[str, dict[str, Any]]:
    """The damage to a checkpoint, and its contents other than the arrays."""
    if damage := find_damage(path, REQUIRED):
        return damage, {}
    try:
        run = _read_run(path)
    except (OSError, ValueError) as error:
        return f"{RUN} is corrupt ({error})", {}
    if run.step not in (None, step):
        return f"is the checkpoint of step {run.step} under another name", {}
    return "", msgspec.structs.asdict(run)


def _check_merged(path: Path) -> None:
    """Raise `OSError` unless Orbax has merged what the processes wrote."""
    for name in REQUIRED[1:]:
        if not (path / name).is_file():
            raise OSError(f"{name} was not written")


def _delete(path: Path) -> None:
    (path / MANIFEST).unlink(missing_ok=True)  # half-deleted, it is then unfinished
    shutil.rmtree(path, ignore_errors=True)


def _differences(saved: dict[str, Any], needed: dict[str, Any]) -> str:
    return "; ".join(
        f"{name}: found {saved.get(name, 'none')}, needed {needed.get(name, 'none')}"
        for name in sorted(saved | needed)
        if name not in saved or name not in needed or saved[name] != needed[name]
    )


def _cannot_write(path: Path, cause: Exception | str) -> str:
    return (
        f"The checkpoint {path} cannot be written: {_reason(cause)}. Free disk space "
        "or check the permissions; the last finished checkpoint is intact."
    )


def _reason(cause: Exception | str) -> str:
    """The operating system's reason, which Orbax buries, or the first line."""
    if code := re.search(r"os_error_code='(\d+)'", str(cause)):
        return os.strerror(int(code[1]))
    return (str(cause) or repr(cause)).splitlines()[0]
