"""Training records from files and directories; the format of each is detected."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from manifold_lora.data.files import find_parts, read_values
from manifold_lora.data.formats import ignored_keys, parse_record
from manifold_lora.data.schema import Record as Record
from manifold_lora.data.schema import Turn as Turn
from manifold_lora.errors import InputError

MAX_PROBLEMS = 8  # shown per file; the rest are counted


class Skipped(NamedTuple):
    """A record that cannot be used and was left out."""

    location: str
    reason: str


class RecordsData(NamedTuple):
    """The records of files and directories, by the part of the data they belong to."""

    train: list[Record]
    valid: list[Record]  # of directories
    test: list[Path]  # of directories; files, read by who needs them
    skipped: list[Skipped]
    ignored_keys: Counter[str]  # keys without meaning, with their records


def read_records(path: str | PathLike[str]) -> list[Record]:
    """Read the training records of a JSON Lines, JSON, CSV or Parquet file.

    The format of every record is detected: `messages`, `conversations`,
    `prompt`+`completion`, `instruction`+`output` (with `input`),
    `instruction`+`response` (with `context`), `question`+`answer` or `text`, the first
    of these whose keys it has. `.jsonl` and `.ndjson` files hold a record per line;
    `.json` files hold a list, `{"data": [...]}`, or lines; `.csv` and `.tsv` files
    name their columns in the first row; `.parquet` files need pyarrow. For a directory
    and for records to leave out, use `read_data`.

    Args:
        path: The file, text in UTF-8.

    Returns:
        The records, at least one, in the order of the file.

    Raises:
        InputError: The file is missing, empty or broken, or has records that are
            invalid; all problems are listed, each with its line or record number.

    Example:
        >>> import pathlib, tempfile
        >>> file = pathlib.Path(tempfile.mkdtemp(), "train.jsonl")
        >>> _ = file.write_text('{"prompt": "1+1=", "completion": "2"}')
        >>> [(record.prompt, record.completion) for record in read_records(file)]
        [('1+1=', '2')]
    """
    return read_files([Path(path).expanduser()]).train


def read_data(
    paths: Sequence[str | PathLike[str]], *, skip_invalid: bool = False
) -> RecordsData:
    """Read the records of several files and directories.

    A directory has a file named train, and perhaps others named valid (validation,
    val, eval, dev) and test, or shards such as train-00000-of-00002.parquet. For one
    file, `read_records` is enough.

    Args:
        paths: Files and directories.
        skip_invalid: Leave out records that cannot be used, instead of raising.

    Raises:
        InputError: As `read_records`; or a directory has no file to train on, or no
            record of a file can be used.

    Example:
        >>> import pathlib, tempfile
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> _ = (folder / "train.csv").write_text("text,id\\nOnce,1\\nTwice,2\\n")
        >>> data = read_data([folder])
        >>> [record.completion for record in data.train], dict(data.ignored_keys)
        (['Once', 'Twice'], {'id': 2})
    """
    files: dict[str, list[Path]] = {"train": [], "valid": [], "test": []}
    for path in (Path(path).expanduser() for path in paths):
        parts = find_parts(path) if path.is_dir() else {"train": [path]}
        for part, found in parts.items():
            files[part] += found
    data = read_files(files["train"], skip_invalid)
    valid = read_files(files["valid"], skip_invalid)
    return RecordsData(
        data.train,
        valid.train,
        files["test"],
        data.skipped + valid.skipped,
        data.ignored_keys + valid.ignored_keys,
    )


def read_files(files: Sequence[Path], skip_invalid: bool = False) -> RecordsData:
    """The records of some files, all of them as `train`."""
    data = RecordsData([], [], [], [], Counter())
    for file in files:
        records, skipped = _read_file(file, data.ignored_keys)
        if skipped and not (skip_invalid and records):
            listed = [f"{location}: {reason}" for location, reason in skipped]
            if len(listed) > MAX_PROBLEMS:
                listed[MAX_PROBLEMS:] = [f"... and {len(listed) - MAX_PROBLEMS} more"]
            raise InputError("\n".join(listed))
        if not records:
            raise InputError(f"{file} holds no records; at least one is needed.")
        data.train.extend(records)
        data.skipped.extend(skipped)
    return data


def _read_file(
    file: Path, ignored: Counter[str]
) -> tuple[list[Record], list[Skipped]]:
    records, skipped = list[Record](), list[Skipped]()
    for location, parse in read_values(file):
        try:
            value: Any = parse()
            record = parse_record(value)
        except RecursionError:
            skipped.append(Skipped(location, "nested too deeply"))
        except (InputError, ValueError) as error:
            skipped.append(Skipped(location, str(error)))
        else:
            ignored.update(ignored_keys(value))
            records.append(dataclasses.replace(record, location=location))
    return records, skipped
