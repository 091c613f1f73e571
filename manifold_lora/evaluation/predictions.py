"""predictions.jsonl: every prediction, from which a killed evaluation resumes."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import msgspec
from filelock import FileLock, Timeout

from manifold_lora.checkpoints.atomic import write_text
from manifold_lora.configuration.flat import differences, flatten
from manifold_lora.decoding import decode_json, read_json
from manifold_lora.errors import InputError
from manifold_lora.evaluation.config import EvaluateConfig
from manifold_lora.evaluation.measures import Row

PREDICTIONS, SETTINGS, SUMMARY, TABLE, CHANGED = FILES = (
    "predictions.jsonl",
    "settings.json",
    "evaluation.json",
    "table.md",
    "changed.jsonl",
)
LOCK = ".lock"


class Predictions:
    """The predictions in a directory, as a context manager that locks it.

    Args:
        config: of the evaluation.
        identity: "data", the digest of the records, and "systems", those of the base
            and the adapters by name.

    Attributes:
        rows: by system and task, then by record.

    Raises:
        InputError: another evaluation runs here; it holds one with other settings,
            records or weights.
    """

    def __init__(self, config: EvaluateConfig, identity: dict[str, Any]):
        self.path = config.directory
        self.rows: dict[tuple[str, str], dict[int, Row]] = {}
        self._config, self._identity = config, identity
        self._lock = FileLock(self.path / LOCK)
        self._file: TextIO | None = None

    def __enter__(self) -> "Predictions":
        if self.path.is_file():
            raise InputError(f"--out {self.path} is a file: choose a directory.")
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise InputError(
                f"an evaluation is going on in {self.path}/: wait for its end, or "
                "choose another --out."
            ) from None
        try:
            self._open()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()
        self._lock.release()

    def write(self, system: str, task: str, rows: Sequence[Row]) -> None:
        """The predictions of a batch; they are on disk when this returns."""
        assert self._file is not None
        rows = [{"system": system, "task": task} | row for row in rows]
        self._file.write("".join(json.dumps(row) + "\n" for row in rows))
        self._file.flush()
        self._add(rows)

    def of(self, system: str, task: str) -> list[Row]:
        """The predictions of a system for a task, in the order of the records."""
        rows = self.rows.get((system, task), {})
        return [rows[record] for record in sorted(rows)]

    def _add(self, rows: Sequence[Row]) -> None:
        for row in rows:
            by_record = self.rows.setdefault((row["system"], row["task"]), {})
            by_record[row["record"]] = row

    def _open(self) -> None:
        settings, file = self.path / SETTINGS, self.path / PREDICTIONS
        if self._config.overwrite:
            for name in FILES:
                (self.path / name).unlink(missing_ok=True)
        identity = self._identity
        if settings.is_file():
            identity = self._check(read_json(settings, remedy="give --overwrite"))
            self._add(_read(file))
        elif others := [p.name for p in self.path.iterdir() if p.name != LOCK]:
            raise InputError(
                f"--out {self.path} is not empty and does not hold an evaluation "
                f"({others[0]}): choose another directory."
            )
        now = {"settings": flatten(self._config), "identity": identity}
        write_text(settings, json.dumps(now, indent=1) + "\n")
        # Without a line that a killed process has written in part.
        rows = [row for by_record in self.rows.values() for row in by_record.values()]
        write_text(file, "".join(json.dumps(row) + "\n" for row in rows))
        self._file = file.open("a", encoding="utf-8")

    def _check(self, before: dict[str, Any]) -> dict[str, Any]:
        """The identity of all that has been evaluated here, if this belongs to it."""
        changes = differences(
            before.get("settings", {}), flatten(self._config), EvaluateConfig
        )
        old, now = before.get("identity", {}), self._identity
        if old.get("data") != now["data"]:
            changes.append("the records changed")
        systems = dict(old.get("systems", {}))
        changes += [
            f"the weights of {name} changed"
            for name, digest in now["systems"].items()
            if systems.get(name, digest) != digest
        ]
        if changes:
            raise InputError(
                f"--out {self.path} holds an evaluation with other settings "
                f"({', '.join(changes)}): choose another --out, or give --overwrite to "
                "replace it."
            )
        return now | {"systems": systems | now["systems"]}


class _Key(msgspec.Struct):
    """What every row has."""

    system: str
    task: str
    record: int


def _read(file: Path) -> list[Row]:
    """The rows of a file; the last line may have been written in part."""
    rows = []
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    for number, line in enumerate(lines, start=1):
        try:
            decode_json(line, _Key)
            rows.append(decode_json(line))
        except ValueError as error:
            if number == len(lines):
                break
            raise InputError(
                f"{file}:{number}: {error}: remove the line, or give --overwrite."
            ) from error
    return rows
