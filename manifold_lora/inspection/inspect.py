"""Inspect the factors of an adapter: tables, JSON and plots.

Reads the files alone, without the base model: adapters of this library, of PEFT's LoRA
and of StelLA.
"""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from manifold_lora.checkpoints.atomic import write_text
from manifold_lora.console import make_console, print_text
from manifold_lora.distributed.mesh import all_devices
from manifold_lora.errors import InputError
from manifold_lora.inspection.measure import gram_matrices, measure
from manifold_lora.inspection.view import draw, show
from manifold_lora.settings import read_path

REPORT = "inspect.json"


class Paths(NamedTuple):
    """The directories of an adapter, of its initialisation and of its report."""

    adapter: Path
    start: Path | None
    out: Path


def inspect_adapter(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Measure an adapter, print tables, and write inspect.json and three plots.

    Args:
        path: a run, or the directory of an adapter of this library, PEFT or StelLA.
        out: output directory. None: inspect/ in the run, or NAME-inspect/ beside an
            adapter outside a run.
        console: for the tables.

    Returns:
        The contents of inspect.json: the report of `measure`, and the paths.

    Raises:
        InputError: there is no adapter, it or its initialisation cannot be read, it
            contains NaN or infinite values, or `out` is a file or inside the adapter.
    """
    from manifold_lora.checkpoints.adapter_file import read_adapter

    console = console or make_console()
    all_devices()  # reports a platform that is not there
    paths = locate(
        read_path(path, "the adapter"), None if out is None else read_path(out, "--out")
    )
    adapter = read_adapter(paths.adapter)
    start = None if paths.start is None else read_adapter(paths.start)
    sources = {
        "adapter": str(paths.adapter),
        "start": None if paths.start is None else str(paths.start),
    }
    with console.status("Measuring", spinner="line"):  # ASCII
        report = sources | measure(adapter, start)
    paths.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=1, allow_nan=False) + "\n"
    write_text(paths.out / REPORT, text)
    plots = draw(paths.out, report, gram_matrices(adapter))
    show(console, report)
    files = ", ".join(str(paths.out / name) for name in (REPORT, *plots))
    print_text(console, f"Wrote {files}")
    return report


def locate(path: Path, out: Path | None = None) -> Paths:
    """Find an adapter and its initialisation, given a run or the adapter itself.

    Raises:
        InputError: there is no adapter, or `out` is a file or inside the adapter.
    """
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise InputError(f"{path} {what}: pass the directory of an adapter or a run.")
    is_run = (path / "adapter").is_dir()
    if not is_run and (path / "config.toml").is_file():
        raise InputError(
            f"{path} is a run without an adapter/: train it first, or pass the "
            "directory of an adapter."
        )
    adapter = path / "adapter" if is_run else path
    # Outside a run, a directory named start/ may be unrelated to the adapter.
    parent = path if is_run else path.resolve().parent
    in_run = is_run or (parent / "config.toml").is_file()
    start = parent / "start" if in_run and (parent / "start").is_dir() else None
    if out is None:
        name = adapter.resolve().name
        is_best = in_run and name == "adapter"
        out = parent / ("inspect" if is_best else f"{name}-inspect")
    if out.is_file():
        raise InputError(f"--out {out} is a file: choose a directory.")
    if out.resolve().is_relative_to(adapter.resolve()):
        raise InputError(
            f"--out {out} is inside the adapter directory, which vLLM and PEFT read: "
            "choose another."
        )
    return Paths(adapter, start, out)
