"""compare.json: the settings of a comparison and the results of its finished runs."""

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from manifold_lora.checkpoints.atomic import write_text
from manifold_lora.comparison.schema import Content, Result, Row
from manifold_lora.decoding import read_json
from manifold_lora.errors import InputError

RESULTS, TABLE, PLOT = "compare.json", "compare.md", "compare.png"
ADAPTERS = "adapters"
SEARCH = " search"  # ends the name of a run of the search
_REMEDY = "choose another --out, or pass --overwrite to start again"


class ResultsFile:
    """Results of finished runs by name; each assignment is written to disk at once.

    Args:
        out: the directory of the comparison.
        settings: of the comparison, JSON-serialisable.
        overwrite: restart instead of resuming.

    Raises:
        InputError: without `overwrite`, the directory contains a comparison with other
            settings, one that cannot be read, or other files.
    """

    def __init__(self, out: Path, settings: dict[str, Any], overwrite: bool = False):
        self.file = out / RESULTS
        self.content: dict[str, Any] = {"settings": settings, "cells": {}}
        if out.is_file():
            raise InputError(f"--out {out} is a file: choose a directory.")
        if overwrite:
            self._clear()
        elif self.file.is_file():
            self.content = self._read(settings)
        elif out.is_dir() and any(not p.name.startswith(".") for p in out.iterdir()):
            raise InputError(
                f"--out {out} is not empty and does not contain a comparison: choose "
                "another directory, or pass --overwrite to write into it."
            )

    def _clear(self) -> None:
        """Delete an earlier comparison, and nothing else."""
        if self.file.is_file():
            shutil.rmtree(self.file.parent / ADAPTERS, ignore_errors=True)
            for name in (RESULTS, TABLE, PLOT):
                (self.file.parent / name).unlink(missing_ok=True)

    def _read(self, settings: dict[str, Any]) -> dict[str, Any]:
        content: Any = read_json(self.file, Content, _REMEDY)
        before, now = dotted(content["settings"]), dotted(settings)
        changed = [
            f"{k} was {before.get(k, 'unset')}, is {now.get(k, 'unset')}"
            for k in sorted(before | now)
            if before.get(k) != now.get(k)
        ]
        if changed:
            shown = ", ".join(changed[:6] + ["…"] * (len(changed) > 6))
            raise InputError(
                f"--out {self.file.parent} contains a comparison with other settings "
                f"({shown}). Choose another --out, or pass --overwrite to replace it."
            )
        for problem in _problems(content, sorted(settings["runs"])):
            raise InputError(f"{self.file}: {problem}: {_REMEDY}.")
        return content | {"settings": settings}

    def __contains__(self, name: str) -> bool:
        return name in self.content["cells"]

    def __getitem__(self, name: str) -> dict[str, Any]:
        return self.content["cells"][name]

    def __setitem__(self, name: str, result: dict[str, Any]) -> None:
        self.content["cells"][name] = result
        self.write()

    def write(self) -> None:
        """Write the file atomically."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.content, indent=1, allow_nan=False) + "\n"
        write_text(self.file, text)


def run_name(
    method: str, rates: Iterable[float], seed: int, steps: int | str, searching: bool
) -> str:
    """The name of a run in compare.json.

    >>> run_name("lora", [0.02], seed=0, steps=6, searching=True)
    'lora rates 0.02 seed 0 steps 6 search'
    """
    shown = " ".join(f"{rate:g}" for rate in rates)
    return f"{method} rates {shown} seed {seed} steps {steps}" + SEARCH * searching


def _problems(content: dict[str, Any], methods: list[str]) -> Iterator[str]:
    """What is wrong with results whose types are right."""
    curves: dict[str, set[tuple[int, ...]]] = {}
    for key, result in content["cells"].items():
        *before, last = result["losses"]
        steps, searching = result["steps"], key.endswith(SEARCH)
        if result["diverged"]:  # at some step before the last
            steps = key.removesuffix(SEARCH).rpartition(" ")[2]
        elif missing := Result.__optional_keys__ - result.keys():
            yield f"{key!r} lacks {', '.join(sorted(missing))}"
        elif last is None or not result["curve"]:
            yield f"{key!r} has no final loss"
        elif not searching:
            points = tuple(point["step"] for point in result["curve"])
            curves.setdefault(result["method"], set()).add(points)
        name = run_name(
            result["method"], result["rates"], result["seed"], steps, searching
        )
        if name != key:
            yield f"{key!r} holds the results of {name!r}"
        if None in before or len(result["losses"]) != result["steps"]:
            yield f"{key!r} lacks losses"
    if any(len(found) > 1 for found in curves.values()):
        yield "the runs of a method were evaluated after different steps"
    if sorted(content.get("step_seconds", methods)) != methods:
        yield "step_seconds are not those of the methods"
    if "summary" not in content:
        return
    rows, measures = content["summary"], Row.__optional_keys__
    if sorted(row["method"] for row in rows) != methods:
        yield "summary is not that of the methods"
    if any(0 < len(measures & row.keys()) < len(measures) for row in rows):
        yield "summary lacks measures of a method"
    if missing := Content.__optional_keys__ - content.keys():
        yield f"summary without {', '.join(sorted(missing))}"


def dotted(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as a flat dict with dotted keys.

    >>> dotted({"runs": {"lora": {"rank": 4}}, "seeds": [0]})
    {'runs.lora.rank': 4, 'seeds': [0]}
    """
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        nested = isinstance(value, dict) and value
        flat |= dotted(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return flat
