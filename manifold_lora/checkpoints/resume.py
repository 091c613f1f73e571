"""Checkpoints of a training run, from which it goes on after any interruption.

Each is a directory named by its step: Orbax's files of the arrays in `state/`, what
else the run needs in `run.json`, and last of all `manifest.json` with the size and
hash of every other file (`manifest.py`). One without a manifest was not finished
and does not count.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from manifold_lora.checkpoints.arrays import read_arrays, write_arrays
from manifold_lora.checkpoints.atomic import write_text
from manifold_lora.checkpoints.manifest import MANIFEST, check, write_manifest
from manifold_lora.checkpoints.one_for_all import failing, first_process
from manifold_lora.errors import InputError

STATE, RUN = "state", "run.json"


class CheckpointError(OSError):
    """A checkpoint could not be written; those written before are untouched."""


class DamagedError(InputError):
    """A checkpoint is missing, or is not what was written."""


class Restored(NamedTuple):
    """What a checkpoint holds."""

    step: int
    state: Any
    progress: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run in one directory, written in the background.

    Every process of the run makes one and calls the same methods in the same order.
    A context manager, at whose end everything is on disk.

    Args:
        directory: where they are; made with the first of them.
        identity: what must be the same for a run to go on from a checkpoint.
        keep: how many of the last are kept, beside the best one.
    """

    skipped: list[str]  # what `newest` found damaged: its path and what is wrong

    def __init__(self, directory: Path, *, identity: dict[str, Any], keep: int = 2):
        self.skipped = []
        self._directory = directory.absolute()
        self._identity = json.loads(json.dumps(identity))
        self._keep = keep
        self._damaged: set[int] = set()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._writing: Future[None] | None = None

    @property
    def steps(self) -> list[int]:
        """The steps on disk that look whole: those that were finished."""
        return sorted(
            int(path.parent.name)
            for path in self._directory.glob(f"*/{MANIFEST}")
            if path.parent.name.isdecimal()
        )

    def save(
        self, step: int, state: Any, progress: dict[str, Any], *, best_step: int
    ) -> None:
        """Copy the state to the host and write it in the background.

        The arrays may be donated as soon as this returns. A step that is on disk whole
        is not written again. When the new checkpoint is finished, older ones are
        deleted but for the last few and those that were best at the time of these.

        Args:
            step: how many steps have been taken.
            state: any tree of JAX arrays, PRNG keys among them.
            progress: what else the run needs, as JSON; NaN and infinity too.
            best_step: the step whose checkpoint is kept as long as this one is.

        Raises:
            CheckpointError: an earlier one could not be written, and nothing of this
                step is; or this one cannot even be begun. A later call tries anew.
        """
        self.wait()
        leaves = _named(state)
        run = {
            "identity": self._identity,
            "progress": progress,
            "best_step": best_step,
            "leaves": {name: _describe(leaf) for name, leaf in leaves.items()},
        }
        text = json.dumps(run, indent=1)
        path = self._directory / str(step)
        arrays = {name: _plain(leaf) for name, leaf in leaves.items()}
        size = sum(array.nbytes for array in arrays.values())
        whole, failure = first_process(lambda: self._prepare(step, size))
        if whole:
            return
        if failure:
            raise CheckpointError(_cannot_write(path, failure))
        done = write_arrays(path / STATE, arrays)
        self._writing = self._thread.submit(self._finish, step, done, text)

    def _prepare(self, step: int, size: int) -> tuple[bool, str]:
        """Is the step whole already? Else make room for it; what stands in the way?"""
        path = self._directory / str(step)
        if step not in self._damaged and not check(path):
            return True, ""
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            finished = set(self.steps) - self._damaged - {step}
            for other in self._directory.iterdir():
                number = other.name.isdecimal() and other.is_dir()
                if number and int(other.name) not in finished:
                    _delete(other)
            # Found out here because Orbax, once it has begun, does not fail neatly.
            free = shutil.disk_usage(self._directory).free
            if free < size:
                message = f"{os.strerror(errno.ENOSPC)}: {size} bytes needed"
                raise OSError(f"{message}, {free} free")
            path.mkdir()
        except OSError as error:
            return False, str(error)
        self._damaged.clear()
        return False, ""

    def _finish(self, step: int, done: Callable[[], None], text: str) -> None:
        """Wait until the arrays are written, add the rest, delete older ones."""
        path = self._directory / str(step)
        try:
            done()
            if jax.process_index() == 0:
                write_text(path / RUN, text)
                write_manifest(path)
                self._delete_old(step)
        except Exception as error:
            if jax.process_index() == 0 and not (path / MANIFEST).exists():
                _delete(path)  # makes room on a full disk
            raise CheckpointError(_cannot_write(path, error)) from error

    def _delete_old(self, step: int) -> None:
        # Later ones are of a past that this run did not go on from.
        last = [other for other in self.steps if other <= step][-self._keep :]
        runs = [self._directory / str(other) / RUN for other in last]
        best = {json.loads(run.read_text("utf-8"))["best_step"] for run in runs}
        for other in set(self.steps) - {*last, *best}:
            _delete(self._directory / str(other))

    def wait(self) -> None:
        """Wait until everything is on disk.

        Raises:
            CheckpointError: it could not be written.
        """
        if self._writing is None:
            return
        failure = self._failure()
        if failed := failing(failure is not None):
            raise failure or CheckpointError(
                f"Process {failed[0]} could not write its part of a checkpoint in "
                f"{self._directory}, and says why."
            )

    def _failure(self) -> BaseException | None:
        """What became of the last write, when it has ended."""
        writing, self._writing = self._writing, None
        return writing.exception() if writing else None

    def newest(self, like: Any) -> Restored | None:
        """The newest whole checkpoint; None where none was ever finished.

        Damaged ones are passed over and named in `skipped`.

        Args:
            like: a tree as the state was saved, of arrays or `jax.ShapeDtypeStruct`s,
                whose shardings say where the arrays go. They need not be those that
                the state was saved with, nor the number of processes.

        Raises:
            InputError: all are damaged, or it is of another run.
        """
        self.wait()
        self.skipped = []
        for step in reversed(first_process(lambda: self.steps)):
            try:
                return self.at(step, like)
            except DamagedError as error:
                self._damaged.add(step)
                self.skipped.append(str(error))
        if self.skipped:
            raise InputError(
                "No checkpoint of this run can be used:\n  "
                + "\n  ".join(self.skipped)
                + "\nPut one back from a copy, or give --overwrite to begin anew."
            )
        return None

    def at(self, step: int, like: Any) -> Restored:
        """The checkpoint of one step; `newest` says what `like` is.

        Raises:
            DamagedError: it is missing or damaged; the message says how.
            InputError: it is of another run.
        """
        self.wait()
        path = self._directory / str(step)
        wrong, run = first_process(lambda: _read(path))
        if wrong:
            raise DamagedError(f"{path}: {wrong}")
        if differences := _differences(run["identity"], self._identity):
            raise InputError(
                f"The checkpoint {path} is of another run: {differences}. Choose "
                "another --out, or give --overwrite to begin anew."
            )
        leaves = _named(like)
        needed = {name: _describe(leaf) for name, leaf in leaves.items()}
        if differences := _differences(run["leaves"], needed):
            raise InputError(
                f"The arrays of the checkpoint {path} are not those of this run: "
                f"{differences}. Run with the configuration it was saved with, choose "
                "another --out, or give --overwrite to begin anew."
            )
        arrays, error = {}, None
        try:
            abstract = {name: _abstract(leaf) for name, leaf in leaves.items()}
            arrays = read_arrays(path / STATE, abstract)
        except Exception as caught:  # whatever Orbax makes of files it does not like
            error = caught
        if failed := failing(error is not None):
            reason = _reason(error) if error else f"process {failed[0]} says why"
            raise DamagedError(f"{path}: cannot be read: {reason}") from error
        state = [_as(leaf, arrays[name]) for name, leaf in leaves.items()]
        tree = jax.tree.structure(like)
        return Restored(step, jax.tree.unflatten(tree, state), run["progress"])

    def close(self) -> None:
        """Wait as `wait` does, and let go of the thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None:
            return self.close()
        # What ended the block is what matters. Other processes, which a write waits
        # for, may be gone.
        if jax.process_count() == 1 and (failure := self._failure()):
            error.add_note(str(failure))
        self._thread.shutdown(wait=jax.process_count() == 1)


def _read(path: Path) -> tuple[str, dict[str, Any]]:
    """What is wrong with a checkpoint, and what it holds beside the arrays."""
    wrong = check(path)
    return wrong, {} if wrong else json.loads((path / RUN).read_text("utf-8"))


def _delete(path: Path) -> None:
    (path / MANIFEST).unlink(missing_ok=True)  # half-deleted is then unfinished
    shutil.rmtree(path, ignore_errors=True)


def _named(tree: Any) -> dict[str, Any]:
    """The leaves by their paths: Orbax need not know the containers."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _plain(leaf: Any) -> Any:
    """A PRNG key as the integers it is made of."""
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _as(like: Any, array: jax.Array) -> jax.Array:
    if not _is_key(like):
        return array
    impl = jax.random.key_impl(jnp.empty((), like.dtype))  # `like` may be no array
    return jax.random.wrap_key_data(array, impl=impl)


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = leaf.sharding or SingleDeviceSharding(jax.local_devices()[0])
    plain = jax.eval_shape(_plain, leaf)
    return jax.ShapeDtypeStruct(plain.shape, plain.dtype, sharding=sharding)


def _describe(leaf: Any) -> str:
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def _differences(found: dict[str, Any], needed: dict[str, Any]) -> str:
    return "; ".join(
        f"{name}: found {found.get(name, 'none')}, needed {needed.get(name, 'none')}"
        for name in sorted(found | needed)
        if name not in found or name not in needed or found[name] != needed[name]
    )


def _cannot_write(path: Path, cause: Exception | str) -> str:
    return (
        f"The checkpoint {path} cannot be written: {_reason(cause)}. Make room there "
        "or change who may write; the checkpoints before it are as they were."
    )


def _reason(cause: Exception | str) -> str:
    """The operating system's reason, which Orbax buries, or the first line."""
    if code := re.search(r"os_error_code='(\d+)'", str(cause)):
        return os.strerror(int(code[1]))
    return (str(cause) or repr(cause)).splitlines()[0]
