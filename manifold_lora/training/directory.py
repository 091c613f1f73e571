"""The directory of a run: one process at a time, nothing lost before a step works.

With `--overwrite` the old run is moved into `.previous/` and deleted after the first
step of the new one; whatever fails before, even the process, brings it back.
"""

import contextlib
import os
import shutil
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import tomli_w
from filelock import FileLock, Timeout

from manifold_lora.checkpoints.adapter_file import CONFIG, EXTRA, FACTORS, WEIGHTS
from manifold_lora.checkpoints.atomic import recover, write_text
from manifold_lora.checkpoints.card import CARD
from manifold_lora.checkpoints.companions import COMPANIONS
from manifold_lora.configuration.flat import differences, flatten
from manifold_lora.decoding import read_json
from manifold_lora.distributed.processes import is_main, wait_for_all
from manifold_lora.errors import InputError
from manifold_lora.training.config import TrainConfig
from manifold_lora.training.run import (
    ADAPTER,
    ENTRIES,
    LAST,
    MERGED,
    SETTINGS,
    START,
    SUMMARY,
)

# What the directories of adapters and of a merged model hold.
_REPLACED = {
    CONFIG,
    WEIGHTS,
    EXTRA,
    FACTORS,
    CARD,
    "config.json",
    "model.safetensors",
    *COMPANIONS,
}
_MAX_PATH = 3800  # of the 4096 bytes of a path, checkpoints need up to 250
LOCK, OWNER, PREVIOUS = ".lock", ".owner", ".previous"
COMPLETE = "complete"  # in the last one, once all of a run is there
_MEANINGS = {"data": "the examples of --data", "base": "the weights of --model"}


class RunDirectory:
    """The directory of a run, as a context manager that locks it.

    Args:
        config: of the run.

    Attributes:
        path: where it is.
        settings: of the run that it holds, from config.toml; none if it holds none or
            `overwrite` replaces it.

    Raises:
        InputError: another process runs in it; it holds a run with another
            configuration, or something that is not a run; it is inside of an adapter.
    """

    def __init__(self, config: TrainConfig):
        self.path = config.run_directory
        self.settings: dict[str, Any] = {}
        self._config = config
        self._made = False
        self._lock = FileLock(self.path / LOCK)

    def __enter__(self) -> "RunDirectory":
        _check_place(self.path, self._config.initial_adapter)
        if is_main():
            self._acquire()
        try:
            self._restore()
            self.settings = self._read_settings()
        except BaseException:
            self._release()
            raise
        return self

    def _acquire(self) -> None:
        self._made = not self.path.is_dir()
        self.path.mkdir(parents=True, exist_ok=True)
        owner = self.path / OWNER
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            text = owner.read_text("utf-8") if owner.is_file() else "unknown"
            raise InputError(
                f"a run is going on in {self.path}/ (process {text}): wait for its "
                "end, or choose another --out."
            ) from None
        owner.write_text(str(os.getpid()), encoding="utf-8")

    def _read_settings(self) -> dict[str, Any]:
        file = self.path / SETTINGS
        if self._config.output.overwrite:
            return {}
        if not file.is_file():
            others = [p.name for p in self.path.glob("*") if p.name in ENTRIES]
            strangers = [p for p in self.path.glob("[!.]*") if p.is_file()]
            if others or strangers:
                raise InputError(
                    f"--out {self.path} is not empty and does not hold a run: choose "
                    "another directory, or give --overwrite to write into it."
                )
            return {}
        try:
            return tomllib.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{file} is not valid TOML ({error}): choose another --out, or give "
                "--overwrite."
            ) from error

    def check_settings(self, config: TrainConfig) -> None:
        """Raise `InputError` if the run here has another configuration.

        It may have had fewer steps or epochs, and is then continued.
        """
        if not self.settings:
            return
        now = flatten(config)
        for name in ("steps", "epochs"):
            before = self.settings.get(name)
            if type(before) is int and before < now.get(name, 0):
                now[name] = before
        if "date" not in self.settings:  # of an earlier version
            now.pop("date", None)
        if changes := differences(self.settings, now, TrainConfig):
            raise InputError(
                f"--out {self.path} holds a run with another configuration "
                f"({', '.join(changes)}). Choose another --out, or give --overwrite to "
                "replace it."
            )

    def finished(self, identity: dict[str, Any], steps: int) -> dict[str, Any] | None:
        """The summary of the same run, if it is finished.

        Raises:
            InputError: it was of other data or of another base.
        """
        if not self.settings:
            return None
        summary = read_summary(self.path)
        if summary is None or _goes_further(summary, steps):
            return None
        before = summary.get("identity", {})
        changed = [name for name in before if before[name] != identity.get(name)]
        if changed:
            names: dict[str, str] = {
                "data": "the examples of --data",
                "base": "the weights of --model",
            }
            what = " and ".join(names.get(name) or name for name in changed)
            raise InputError(
                f"{what} changed since the run in {self.path}/ was finished: choose "
                "another --out, or give --overwrite to run it again."
            )
        return summary

    def open(self, config: TrainConfig) -> None:
        """Prepare the directory for training: move an old run aside, write config.toml.

        All processes call it; one of them writes.
        """
        if is_main():
            for folder in (ADAPTER, START, LAST, MERGED):
                recover(self.path / folder)
                _check_replaceable(self.path / folder)
            if config.output.overwrite:
                _move(self.path, self.path / PREVIOUS)
                (self.path / PREVIOUS / COMPLETE).touch()
            (self.path / SUMMARY).unlink(missing_ok=True)
            write_text(self.path / SETTINGS, tomli_w.dumps(flatten(config)))
            self._made = False
        wait_for_all("run directory")

    def commit(self) -> None:
        """Delete the run that was moved aside: a step of the new one has worked."""
        if is_main():
            shutil.rmtree(self.path / PREVIOUS, ignore_errors=True)

    def _restore(self) -> None:
        """Bring back a run that was moved aside for one that took no step."""
        previous = self.path / PREVIOUS
        if is_main() and previous.is_dir():
            if (previous / COMPLETE).exists():  # what is there is of the new run
                for name in ENTRIES:
                    _delete(self.path / name)
                (previous / COMPLETE).unlink()
            _move(previous, self.path)
            previous.rmdir()

    def _release(self) -> None:
        if not self._lock.is_locked:
            return
        (self.path / OWNER).unlink(missing_ok=True)
        if not any((self.path / name).exists() for name in ENTRIES):
            (self.path / LOCK).unlink(missing_ok=True)  # leave no trace
            with contextlib.suppress(OSError):  # not empty
                if self._made:
                    self.path.rmdir()
        self._lock.release()

    def __exit__(self, *exception: object) -> None:
        self._restore()
        self._release()


def read_summary(out: Path) -> dict[str, Any] | None:
    """The content of summary.json; none if it is missing, damaged or no summary."""
    try:
        summary = read_json(out / SUMMARY)
        msgspec.convert(summary, _Summary)
    except (OSError, InputError, msgspec.ValidationError):
        return None
    return summary


class _Summary(msgspec.Struct):
    """What is read of a summary; the rest is for people."""

    steps: int
    loss_after: float | None
    planned_steps: int = 0
    identity: dict[str, Any] = {}


def saved_date(settings: dict[str, Any]) -> str | None:
    """The date with which a run rendered its chats."""
    date = settings.get("date")
    return date if isinstance(date, str) else None


def _goes_further(summary: dict[str, Any], steps: int) -> bool:
    """Whether more steps are wanted than a finished run was to take."""
    return steps > summary.get("planned_steps", summary["steps"])


def _check_place(out: Path, adapter: Path | None) -> None:
    if out.is_file():
        raise InputError(f"--out {out} is a file: choose a directory.")
    inside = out.absolute()
    if (length := len(os.fsencode(inside))) > _MAX_PATH:
        raise InputError(
            f"--out is a path of {length} bytes, and the checkpoints in it need longer "
            f"ones: choose one of at most {_MAX_PATH}."
        )
    for folder in (inside, *inside.parents):
        if (folder / CONFIG).is_file():
            raise InputError(
                f"--out {out} is inside of the adapter {folder}: choose a directory "
                "elsewhere."
            )
    if adapter is not None and inside in adapter.absolute().parents:
        raise InputError(
            f"--adapter {adapter} is inside of --out {out}, which the run would "
            "replace: choose another --out."
        )


def _check_replaceable(path: Path) -> None:
    """Files of the user where an adapter is to be written would be lost, or end it."""
    visible = [p for p in path.glob("[!.]*") if p.name not in _REPLACED]
    if path.is_file() or visible:
        raise InputError(
            f"{path} holds what is not of a run "
            f"({', '.join(p.name for p in visible)}): move it elsewhere, or choose "
            "another --out."
        )


def _move(source: Path, target: Path) -> None:
    """Move what runs write from one directory to another."""
    target.mkdir(exist_ok=True)
    for path in list(source.iterdir()):
        if path.name in ENTRIES or path.name.startswith("events.out.tfevents"):
            path.rename(target / path.name)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
