"""The directory of a run: its configuration, its metrics, its summary."""

import importlib
import json
import shutil
import tomllib
from pathlib import Path
from typing import Any

import tomli_w

from manifold_lora.errors import InputError
from manifold_lora.training.config import ResolvedConfig, as_toml

SUMMARY, SETTINGS, METRICS, ADAPTER, START, MERGED, INSPECTED, PICTURE = (
    "summary.json",
    "config.toml",
    "metrics.jsonl",
    "adapter",
    "start",  # the adapter before the first step
    "merged",  # the whole model, of an adapter that can only be merged
    "inspect",  # of `manifold-lora inspect`
    "loss.png",
)


def finished(config: ResolvedConfig) -> dict[str, Any] | None:
    """The summary of the same run, if it has been run to its end in this directory.

    Raises:
        InputError: the directory holds a run with another configuration, or
            something that is no run, and `overwrite` is off.
    """
    out = config.run_directory
    if out.is_file():
        raise InputError(f"--out {out} is a file: choose a directory.")
    if config.overwrite or not out.is_dir() or not any(out.iterdir()):
        return None
    if not (out / SETTINGS).is_file():
        raise InputError(
            f"--out {out} is not empty and holds no run: choose another directory, or "
            "give --overwrite to write into it."
        )
    try:
        before = tomllib.loads((out / SETTINGS).read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(
            f"{out / SETTINGS} is not valid TOML ({error}): choose another --out, or "
            "give --overwrite."
        ) from error
    now = as_toml(config)
    if before != now:
        keys = sorted(k for k in before | now if before.get(k) != now.get(k))
        changes = ", ".join(
            f"{k} = {before.get(k, 'unset')} there, {now.get(k, 'unset')} now"
            for k in keys
        )
        raise InputError(
            f"--out {out} holds a run with another configuration ({changes}). Choose "
            "another --out, or give --overwrite to replace it."
        )
    if not (out / SUMMARY).is_file():
        return None
    return json.loads((out / SUMMARY).read_text(encoding="utf-8"))


def open_run(config: ResolvedConfig) -> Path:
    """Make the directory, empty it of earlier results, and write the config."""
    out = config.run_directory
    out.mkdir(parents=True, exist_ok=True)
    for name in (SUMMARY, METRICS, PICTURE):
        (out / name).unlink(missing_ok=True)
    for folder in (MERGED, INSPECTED):
        shutil.rmtree(out / folder, ignore_errors=True)
    (out / SETTINGS).write_text(tomli_w.dumps(as_toml(config)), encoding="utf-8")
    return out


class Metrics:
    """Rows of numbers to metrics.jsonl and, where asked for, to a tracker."""

    def __init__(self, out: Path, config: ResolvedConfig):
        self.rows: list[dict[str, Any]] = []
        self._trackers = [_TRACKERS[name](out, config) for name in config.report]
        self._file = (out / METRICS).open("w", encoding="utf-8")

    def write(self, **row: Any) -> None:
        """One row; it is on disk when this returns."""
        self.rows.append(row)
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for log, _ in self._trackers:
            log(row)

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()
        for _, close in self._trackers:
            close()


def _tensorboard(out: Path, config: ResolvedConfig):
    del config
    writer = _extra("tensorboardX", "tensorboard").SummaryWriter(str(out))

    def log(row: dict[str, Any]) -> None:
        for name, value in row.items():
            if name != "step":
                writer.add_scalar(name, value, row["step"])

    return log, writer.close


def _wandb(out: Path, config: ResolvedConfig):
    run = _extra("wandb", "wandb").init(dir=str(out), config=as_toml(config))
    return lambda row: run.log(row, step=row["step"]), run.finish


_TRACKERS = {"tensorboard": _tensorboard, "wandb": _wandb}


def _extra(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"--report {extra} needs {module}: pip install 'manifold-lora[{extra}]'."
        ) from error
