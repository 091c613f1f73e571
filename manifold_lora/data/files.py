"""Files of any supported kind to the values of their records."""

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from manifold_lora.decoding import DuplicateKey, unique_keys
from manifold_lora.errors import InputError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
KINDS = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
# Names of the files to train, validate and test on; train-00000-of-00002 is a shard.
PARTS = [
    re.compile(rf"({names})([-_.]\d.*)?", re.IGNORECASE)
    for names in ("train|training", "valid|validation|val|eval|dev", "test")
]
# The location of a record, and a function that parses its value or raises ValueError.
Values = Iterator[tuple[str, Callable[[], Any]]]


def read_values(path: Path) -> Values:
    """The location of each record of a file, and a function that parses its value.

    `.jsonl` and `.ndjson` files hold a record per line; `.json` files hold a list,
    `{"data": [...]}`, or lines; the first row of `.csv` and `.tsv` files names the
    columns; `.parquet` files need pyarrow.

    Raises:
        InputError: The file is missing, of another kind, or broken as a whole.
    """
    if _is(Path.is_dir, path):
        raise InputError(f"{path} is a directory; give one {KINDS} file in it.")
    if not _is(Path.is_file, path):
        raise InputError(f"{path} does not exist; give a {KINDS} file.")
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(
            f"{path} must end in {KINDS}, got {path.suffix or 'no suffix'}; convert "
            "it, one JSON object per line."
        )
    if suffix == ".parquet":
        return _numbered(path, _read_parquet(path))
    text = _read_text(path)
    if suffix in (".csv", ".tsv"):
        return _table(path, text, "\t" if suffix == ".tsv" else ",")
    return _json(path, text)


class Parts(NamedTuple):
    """The files of the parts of the data; those to validate and test on may lack."""

    train: list[Path]
    valid: list[Path]
    test: list[Path]


def find_files(paths: Iterable[Path]) -> Parts:
    """The data files of several files and directories.

    A file is one to train on. A directory has a file named train, and perhaps others
    named valid (validation, val, eval, dev) and test, or shards such as
    train-00000-of-00002.parquet.

    Raises:
        InputError: A directory has no file to train on, or has a part in several kinds.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> (folder / "train.csv").touch(), (folder / "dev.csv").touch()
        (None, None)
        >>> [[file.name for file in files] for files in find_files([folder])]
        [['train.csv'], ['dev.csv'], []]
    """
    parts = Parts([], [], [])
    for path in paths:
        if _is(Path.is_dir, path):
            for part, files in zip(parts, _find_parts(path), strict=True):
                part.extend(files)
        else:
            parts.train.append(path)
    return parts


def _find_parts(directory: Path) -> Parts:
    try:
        files = sorted(directory.iterdir())
    except OSError as error:
        raise InputError(f"{directory} cannot be read: {error.strerror}.") from error
    parts = Parts(
        *(
            [
                file
                for file in files
                if file.suffix.lower() in SUFFIXES and pattern.fullmatch(file.stem)
            ]
            for pattern in PARTS
        )
    )
    if not parts.train:
        names = ", ".join(file.name for file in files[:20]) or "nothing"
        more = f" and {len(files) - 20} more" if len(files) > 20 else ""
        raise InputError(
            f"{directory} has no file to train on, such as train.jsonl or "
            f"train.parquet; it holds {names}{more}. Rename one, or give the files."
        )
    for part in parts:
        if len(part) > 1 and not _are_shards(part):
            raise InputError(
                f"{directory} has several files for one part of the data: "
                f"{', '.join(file.name for file in part)}. Give the files to use."
            )
    return parts


def _is(test: Callable[[Path], bool], path: Path) -> bool:
    try:
        return test(path)
    except OSError as error:  # such as a name that is too long
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error


def _are_shards(files: list[Path]) -> bool:
    names = {(re.sub(r"\d+", "", file.stem), file.suffix) for file in files}
    return len(names) == 1


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}; convert it.") from error


def _numbered(path: Path, values: Iterable[Any]) -> Values:
    for number, value in enumerate(values, start=1):
        yield f"{path}, record {number}", lambda value=value: value


def _json(path: Path, text: str) -> Values:
    if path.suffix.lower() == ".json" and text.strip():
        try:
            content = _decode(text)
        except json.JSONDecodeError as error:
            if error.msg != "Extra data":  # which is what the parser says of JSON Lines
                raise InputError(f"{path}: not JSON: {error}") from error
        except ValueError as error:
            raise InputError(f"{path}: {error}") from error
        else:
            if isinstance(content, dict) and isinstance(content.get("data"), list):
                content = content["data"]
            values = content if isinstance(content, list) else [content]
            yield from _numbered(path, values)
            return
    # Not splitlines: it also splits at U+2028, which may occur inside a string.
    for number, line in enumerate(io.StringIO(text, newline=None), start=1):
        if line.strip():
            yield f"{path}:{number}", partial(_decode_line, line)


def _decode_line(line: str) -> Any:
    try:
        return _decode(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} (column {error.colno})") from error


def _decode(text: str) -> Any:
    """JSON as Python writes it, NaN included, but no key twice."""
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except (json.JSONDecodeError, DuplicateKey):
        raise
    except RecursionError as error:
        raise ValueError("not JSON: nested too deeply") from error
    except ValueError as error:  # Python reads integers of 4300 digits at most
        raise ValueError(f"not JSON: {error}") from error


def _table(path: Path, text: str, delimiter: str) -> Values:
    rows, lines = [], []
    limit = csv.field_size_limit(2**31 - 1)  # by default 128 KiB, less than a text
    try:
        source = io.StringIO(text, newline="")
        reader = csv.reader(source, delimiter=delimiter, strict=True)
        for row in reader:
            rows.append(row)
            lines.append(reader.line_num)  # the last line of the row
    except csv.Error as error:
        line = lines[-1] + 1 if lines else 1
        raise InputError(
            f"{path}:{line}: not {path.suffix[1:]}: {error}; quotes in a text must be "
            "doubled, and the text stand in quotes."
        ) from error
    finally:
        csv.field_size_limit(limit)
    names = rows[0] if rows else []
    if len({*names}) < len(names) or not all(name.strip() for name in names):
        raise InputError(
            f"{path}: the first row must name the columns, each once, got "
            f"{', '.join(map(repr, names[:8]))}."
        )
    for row, line in zip(rows[1:], lines[1:], strict=True):
        if row:
            yield f"{path}:{line}", partial(_row, names, row)


def _row(names: list[str], row: list[str]) -> dict[str, str]:
    if len(row) != len(names):
        raise ValueError(
            f"the row has {len(row)} cells and the first row names {len(names)} "
            "columns; texts with commas, quotes or line ends must stand in quotes"
        )
    return dict(zip(names, row, strict=True))


def _read_parquet(path: Path) -> Iterator[Any]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise InputError(
            f"{path} needs pyarrow: pip install 'manifold-lora[parquet]'."
        ) from error
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    yield {key: _without_nulls(item) for key, item in row.items()}
    except (ArrowException, OSError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read as Parquet: {error}; write or download it again."
        ) from error


def _without_nulls(value: Any) -> Any:
    """Without the nulls that fill up structs whose rows have different keys."""
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return value
