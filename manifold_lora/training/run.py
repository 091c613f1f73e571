"""The directory of a run: its files, and the metrics that it writes."""

import contextlib
import importlib
import json
import shutil
import tomllib
from pathlib import Path
from typing import Any

import tomli_w

from manifold_lora.checkpoints.atomic import recover, write_text
from manifold_lora.checkpoints.store import Restored
from manifold_lora.configuration.flat import differences, flatten
from manifold_lora.distributed.processes import is_main, wait_for_all
from manifold_lora.errors import InputError
from manifold_lora.training.config import TrainConfig

(
    SUMMARY,
    SETTINGS,
    METRICS,
    ADAPTER,
    START,
    CHECKPOINTS,
    MERGED,
    INSPECTED,
    PICTURE,
) = (
    "summary.json",
    "config.toml",
    "metrics.jsonl",
    "adapter",
    "start",  # the adapter before the first step
    "checkpoints",  # to resume from
    "merged",  # the whole model, of an adapter that can only be merged
    "inspect",  # of `manifold-lora inspect`
    "loss.png",
)


def finished(config: TrainConfig) -> dict[str, Any] | None:
    """The summary of the same run, if it is finished in this directory.

    Raises:
        InputError: the directory holds a run with another configuration, or
            something that is not a run, and `overwrite` is off.
    """
    out = config.run_directory
    if out.is_file():
        raise InputError(f"--out {out} is a file: choose a directory.")
    # Hidden files are what a killed process was writing.
    empty = not out.is_dir() or all(p.name.startswith(".") for p in out.iterdir())
    if config.output.overwrite or empty:
        return None
    if not (out / SETTINGS).is_file():
        raise InputError(
            f"--out {out} is not empty and does not hold a run: choose another "
            "directory, or give --overwrite to write into it."
        )
    try:
        before = tomllib.loads((out / SETTINGS).read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(
            f"{out / SETTINGS} is not valid TOML ({error}): choose another --out, or "
            "give --overwrite."
        ) from error
    if changes := differences(before, flatten(config), TrainConfig):
        raise InputError(
            f"--out {out} holds a run with another configuration "
            f"({', '.join(changes)}). Choose another --out, or give --overwrite to "
            "replace it."
        )
    if not (out / SUMMARY).is_file():
        return None
    return json.loads((out / SUMMARY).read_text(encoding="utf-8"))


def open_run(config: TrainConfig) -> Path:
    """Create the run directory, or prepare it for resuming, and write config.toml.

    With `overwrite` all that an earlier run left is removed. All processes call it;
    one of them writes.
    """
    out = config.run_directory
    if is_main():
        _prepare(config, out)
    wait_for_all("run directory")
    return out


def _prepare(config: TrainConfig, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for folder in (ADAPTER, START, MERGED):
        recover(out / folder)
    if config.output.overwrite:
        for name in (SUMMARY, METRICS, PICTURE):
            (out / name).unlink(missing_ok=True)
        for folder in (CHECKPOINTS, MERGED, INSPECTED):
            shutil.rmtree(out / folder, ignore_errors=True)
    write_text(out / SETTINGS, tomli_w.dumps(flatten(config)))


class Metrics:
    """Rows of numbers to metrics.jsonl and, where asked for, to a tracker.

    Args:
        out: the run directory.
        config: of the run.
        restored: the checkpoint that the run resumes from; rows of later steps are
            dropped, since these steps are repeated.
    """

    def __init__(self, out: Path, config: TrainConfig, restored: Restored | None):
        file = out / METRICS
        self.rows, self._trackers, self._file = [], [], None
        if is_main():
            self.rows = _rows_until(file, restored.step) if restored else []
            write_text(file, "".join(json.dumps(row) + "\n" for row in self.rows))
            self._trackers = [_TRACKERS[name](out, config) for name in config.report]
            self._file = file.open("a", encoding="utf-8")

    def write(self, **row: Any) -> None:
        """One row; it is on disk when this returns."""
        if self._file is None:
            return
        self.rows.append(row)
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for log, _ in self._trackers:
            log(row)

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()
        for _, close in self._trackers:
            close()


def _rows_until(file: Path, step: int) -> list[dict[str, Any]]:
    """The rows of an earlier file up to a step, without one that is incomplete."""
    rows = []
    if file.is_file():
        for line in file.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
    return [row for row in rows if row["step"] <= step]


def _tensorboard(out: Path, config: TrainConfig):
    del config
    writer = _extra("tensorboardX", "tensorboard").SummaryWriter(str(out))

    def log(row: dict[str, Any]) -> None:
        for name, value in row.items():
            if name != "step":
                writer.add_scalar(name, value, row["step"])

    return log, writer.close


def _wandb(out: Path, config: TrainConfig):
    run = _extra("wandb", "wandb").init(dir=str(out), config=flatten(config))
    return lambda row: run.log(row, step=row["step"]), run.finish


_TRACKERS = {"tensorboard": _tensorboard, "wandb": _wandb}


def _extra(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"--report {extra} needs {module}: pip install 'manifold-lora[{extra}]'."
        ) from error
