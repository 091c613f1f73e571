"""A manifest of the files of a directory, which reveals any damage to them."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from manifold_lora.checkpoints.atomic import write_text
from manifold_lora.decoding import decode_json

MANIFEST = "manifest.json"


def write_manifest(directory: Path) -> None:
    """List all files in the directory with size and SHA-256, atomically."""
    files = {
        name: [(directory / name).stat().st_size, _sha256(directory / name)]
        for name in _names(directory)
    }
    write_text(directory / MANIFEST, json.dumps(files, indent=1))


def find_damage(directory: Path, required: Iterable[str] = ()) -> str:
    """Describe how the files differ from the manifest; "" if they do not.

    A manifest that does not list all files there and those required is damaged too.
    """
    if not directory.is_dir():
        return "is missing"
    if not (directory / MANIFEST).exists():
        return "was not finished"
    try:
        text = (directory / MANIFEST).read_bytes()
        files = decode_json(text, dict[str, tuple[int, str]])
        # Hidden files, such as .DS_Store, may be of others.
        names = {name for name in _names(directory) if not _is_hidden(name)}
        unlisted = sorted({*names, *required} - files.keys())
        damage = [f"{MANIFEST} lacks {name}" for name in unlisted]
        damage += [
            _damage_to(directory, name, size, digest)
            for name, (size, digest) in files.items()
        ]
    except ValueError as error:
        return f"{MANIFEST} is corrupt ({error})"
    except OSError as error:
        return f"cannot be read ({error})"
    return "; ".join(filter(None, damage))


def _names(directory: Path) -> list[str]:
    """All files in the directory but its manifest."""
    files = sorted(file for file in directory.rglob("*") if file.is_file())
    return [str(f.relative_to(directory)) for f in files if f.name != MANIFEST]


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in Path(name).parts)


def _damage_to(directory: Path, name: str, size: int, digest: str) -> str:
    file = directory / name
    if not file.is_file():
        return f"{name} is missing"
    if (actual := file.stat().st_size) != size:
        return f"{name} has {actual} bytes instead of {size}"
    return "" if _sha256(file) == digest else f"{name} was changed"


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
