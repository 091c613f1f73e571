"""Files and directories that are written atomically: complete or not at all."""

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file


@contextlib.contextmanager
def atomic_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A new directory to write into, which becomes `path` when the block ends.

    An existing directory of that name is replaced only then. After an error inside the
    block, such as a full disk, it is untouched and the partial one is removed.
    """
    path = Path(os.path.abspath(path))
    partial = path.with_name(f".{_short_name(path)}.{os.getpid()}.partial")
    old = path.with_name(f".{_short_name(path)}.{os.getpid()}.old")
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)  # of a killed process with this id
    partial.mkdir()
    try:
        yield partial
        # safetensors 0.8 makes its files readable by the owner only, whatever the umask
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


def _short_name(path: Path) -> str:
    """The name, or a hash of one that would be too long with more around it."""
    name = os.fsencode(path.name)
    return hashlib.sha256(name).hexdigest() if len(name) > 200 else path.name


def recover(path: str | os.PathLike[str]) -> None:
    """Clean up after processes killed inside `atomic_directory(path)`.

    One killed between its two renames has left no `path`, but the older directory
    under a hidden name, which is renamed back. All other leftovers are removed. No
    other process may be writing `path` at the time.
    """
    path = Path(os.path.abspath(path))
    name = re.compile(rf"\.{re.escape(_short_name(path))}\.\d+\.(old|partial)")
    leftovers = [p for p in path.parent.glob(".*") if name.fullmatch(p.name)]
    old = [p for p in leftovers if p.suffix == ".old"]
    if old and not path.exists():
        max(old, key=lambda p: p.stat().st_mtime_ns).rename(path)
    for leftover in leftovers:
        shutil.rmtree(leftover, ignore_errors=True)


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """The path of a hidden file to write, which becomes `path` when the block ends.

    It has the suffix of `path`, which tells Matplotlib the format of a picture. After
    an error inside the block an existing file is untouched and the partial one removed.
    """
    path = Path(path)
    # A long name must stay within the 255 bytes of a file system.
    name = f".{path.stem[:40]}.{os.getpid()}.partial{path.suffix[:40]}"
    partial = path.with_name(name)
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file atomically, replacing any existing one."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def save_tensors(tensors: dict[str, np.ndarray], file: Path) -> None:
    """Write a safetensors file with the metadata that PyTorch's tools expect.

    Raises:
        OSError: the file cannot be written. (safetensors raises an error of its own,
            even for a full disk.)
    """
    # safetensors would write the memory of a transposed array as if it were not.
    whole = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
    try:
        save_file(whole, file, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{file} cannot be written: {error}") from error
