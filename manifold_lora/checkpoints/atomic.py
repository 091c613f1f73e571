"""Files and directories that appear complete or not at all."""

import contextlib
import os
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
