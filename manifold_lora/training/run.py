"""The files of a run, and the metrics that it writes."""

import contextlib
import importlib
import json
from pathlib import Path
from typing import Any

from manifold_lora.checkpoints.atomic import write_text
from manifold_lora.checkpoints.store import Restored
from manifold_lora.configuration.flat import flatten
from manifold_lora.distributed.processes import is_main
from manifold_lora.errors import InputError
from manifold_lora.training.config import TrainConfig

(
    SUMMARY,
    SETTINGS,
    METRICS,
    ADAPTER,
    LAST,
    START,
    CHECKPOINTS,
    MERGED,
    INSPECTED,
    EVALUATED,
    PICTURE,
) = ENTRIES = (
    "summary.json",
    "config.toml",
    "metrics.jsonl",
    "adapter",  # the result
    "last",  # the adapter after the last step
    "start",  # the adapter before the first step
    "checkpoints",  # to resume from
    "merged",  # the whole model, of an adapter that can only be merged
    "inspect",  # of `manifold-lora inspect`
    "evaluation",  # of `manifold-lora evaluate`
    "loss.png",
)


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
    """The rows of an earlier file up to a step, without those that are damaged."""
    rows = []
    if file.is_file():
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError, RecursionError):
                rows.append(json.loads(line))
    return [row for row in rows if _is_row(row) and row["step"] <= step]


def _is_row(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and type(row.get("step")) is int
        and all(type(value) in (int, float) for value in row.values())
    )


def check_trackers(config: TrainConfig) -> None:
    """Raise `InputError` for a tracker that is not installed."""
    for name in config.report:
        _extra(*_MODULES[name])


def _tensorboard(out: Path, config: TrainConfig):
    del config
    writer = _extra(*_MODULES["tensorboard"]).SummaryWriter(str(out))

    def log(row: dict[str, Any]) -> None:
        for name, value in row.items():
            if name != "step":
                writer.add_scalar(name, value, row["step"])

    return log, writer.close


def _wandb(out: Path, config: TrainConfig):
    run = _extra(*_MODULES["wandb"]).init(dir=str(out), config=flatten(config))
    return lambda row: run.log(row, step=row["step"]), run.finish


_TRACKERS = {"tensorboard": _tensorboard, "wandb": _wandb}
_MODULES = {"tensorboard": ("tensorboardX", "tensorboard"), "wandb": ("wandb", "wandb")}


def _extra(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"--report {extra} needs {module}: pip install 'manifold-lora[{extra}]'."
        ) from error
