"""Training records from files and directories; the format of each is detected."""

import dataclasses
import os
from collections import Counter
from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from manifold_lora.data.files import read_values
from manifold_lora.data.formats import ignored_keys, parse_record
from manifold_lora.data.schema import Record as Record
from manifold_lora.data.schema import Turn as Turn
from manifold_lora.errors import InputError

MAX_PROBLEMS = 8  # shown per file; the rest are counted


class FilesRead(NamedTuple):
    """The records of some files, and what was left out."""

    records: list[Record]
    skipped: list[str]  # location and reason of the records left out
    ignored_keys: Counter[str]  # keys without meaning, with the records that have them


def read_records(path: str | PathLike[str]) -> list[Record]:
    """Read the training records of a JSON Lines, JSON, CSV or Parquet file.

    The format of every record is detected: `messages`, `conversations`,
    `prompt`+`completion`, `instruction`+`output` (with `input`),
    `instruction`+`response` (with `context`), `question`+`answer` or `text`, the first
    of these whose keys it has. `.jsonl` and `.ndjson` files hold a record per line;
    `.json` files hold a list, `{"data": [...]}`, or lines; `.csv` and `.tsv` files
    name their columns in the first row; `.parquet` files need pyarrow. For
    several files and for records to leave out, use `read_files`.

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
    return read_files([path]).records


def read_files(
    paths: Iterable[str | PathLike[str]], *, skip_invalid: bool = False
) -> FilesRead:
    r"""Read the records of several files, and report what is left out.

    Use `read_records` for the records of one file, and `data.files.find_files` for the
    files of directories.

    Args:
        paths: The files.
        skip_invalid: Leave out records that cannot be used, instead of raising.

    Raises:
        InputError: As `read_records`; or no record of a file can be used.

    Example:
        >>> import pathlib, tempfile
        >>> file = pathlib.Path(tempfile.mkdtemp(), "train.csv")
        >>> _ = file.write_text("text,id\nOnce,1\n,2\n")
        >>> read = read_files([file], skip_invalid=True)
        >>> [record.completion for record in read.records], dict(read.ignored_keys)
        (['Once'], {'id': 1})
        >>> [text.rpartition("/")[2] for text in read.skipped]
        ['train.csv:3: text is empty']
    """
    read = FilesRead([], [], Counter())
    for path in paths:
        file = Path(os.path.expanduser(path))  # a user who is not there is no error
        records, skipped = _read_file(file, read.ignored_keys)
        if skipped and not (skip_invalid and records):
            listed = skipped[:MAX_PROBLEMS]
            if more := len(skipped) - len(listed):
                listed.append(f"... and {more} more")
            remedy = "Fix these records, or leave them out: --skip-invalid."
            raise InputError("\n".join(listed) + f". {remedy}")
        if not records:
            raise InputError(f"{file} holds no records; at least one is needed.")
        read.records.extend(records)
        read.skipped.extend(skipped)
    return read


def _read_file(file: Path, ignored: Counter[str]) -> tuple[list[Record], list[str]]:
    records, skipped = list[Record](), list[str]()
    for location, parse in read_values(file):
        try:
            value: Any = parse()
            record = parse_record(value)
        except (InputError, ValueError) as error:
            skipped.append(f"{location}: {error}")
        else:
            ignored.update(ignored_keys(value))
            records.append(dataclasses.replace(record, location=location))
    return records, skipped
