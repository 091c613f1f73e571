"""Files and directories that appear complete or not at all."""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file


@contextlib.contextmanager
def whole_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A new directory to write into, which becomes `path` when the block ends.

    An older directory of that name is replaced only then; after an error inside the
    block (a full disk, say) it is untouched and the half-written one is removed.
    """
    path = Path(os.path.abspath(path))
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)  # of a killed process with this id
    partial.mkdir()
    try:
        yield partial
        # safetensors 0.8 lets only the owner read its files, whatever the umask says
        for file in partial.iterdir():
            file.chmod(partial.stat().st_mode & 0o666)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)  # likewise
            path.rename(old)
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if old.exists() and not path.exists():
            old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def recover(path: str | os.PathLike[str]) -> None:
    """Put right what processes killed inside `whole_directory(path)` left behind.

    Killed between its two renames, one has left no `path` but the older directory
    under its hidden name, which gets its name back. Everything else is removed.
    No other process may be writing `path` now.
    """
    path = Path(os.path.abspath(path))
    name = re.compile(rf"\.{re.escape(path.name)}\.\d+\.(old|partial)")
    left = [p for p in path.parent.glob(".*") if name.fullmatch(p.name)]
    old = [p for p in left if p.suffix == ".old"]
    if old and not path.exists():
        max(old, key=lambda p: p.stat().st_mtime_ns).rename(path)
    for leftover in left:
        shutil.rmtree(leftover, ignore_errors=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file whole or not at all; an older one is replaced only then."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def save_tensors(tensors: dict[str, np.ndarray], file: Path) -> None:
    """Write a safetensors file as PyTorch's tools expect it.

    Raises:
        OSError: the file cannot be written; safetensors has an error of its own for
            a full disk, which looks like a defect.
    """
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{file} cannot be written: {error}") from error
