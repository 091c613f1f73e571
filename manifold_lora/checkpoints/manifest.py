"""A list of the files of a directory, by which any damage to them is found."""

import hashlib
import json
from pathlib import Path

from manifold_lora.checkpoints.atomic import write_text

MANIFEST = "manifest.json"


def write_manifest(directory: Path) -> None:
    """List all files in the directory with size and hash; whole or not at all."""
    files = {
        str(file.relative_to(directory)): [file.stat().st_size, _hash(file)]
        for file in sorted(directory.rglob("*"))
        if file.is_file() and file.name != MANIFEST
    }
    write_text(directory / MANIFEST, json.dumps(files, indent=1))


def check(directory: Path) -> str:
    """What is wrong with the files of a directory; "" if they are as listed."""
    if not directory.is_dir():
        return "is missing"
    if not (directory / MANIFEST).exists():
        return "was not finished"
    try:
        files = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        checked = [
            _check(directory, name, size, digest)
            for name, (size, digest) in files.items()
        ]
    except (ValueError, TypeError, AttributeError) as error:
        return f"{MANIFEST} is damaged ({error})"
    except OSError as error:
        return f"cannot be read ({error})"
    return "; ".join(filter(None, checked))


def _check(directory: Path, name: str, size: int, digest: str) -> str:
    file = directory / name
    if not file.is_file():
        return f"{name} is missing"
    if (found := file.stat().st_size) != size:
        return f"{name} has {found} bytes instead of {size}"
    return "" if _hash(file) == digest else f"{name} was changed"


def _hash(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
