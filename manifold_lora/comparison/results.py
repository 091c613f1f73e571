"""compare.json: the settings of a comparison and the results of its finished runs."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from manifold_lora.errors import InputError

RESULTS, TABLE, PLOT = "compare.json", "compare.md", "compare.png"
ADAPTERS = "adapters"


class ResultsFile:
    """Results of finished runs by name; each assignment is written to disk at once.

    Args:
        out: the directory of the comparison.
        settings: of the comparison, JSON-serialisable.
        overwrite: restart instead of resuming.

    Raises:
        InputError: without `overwrite`, the directory contains a comparison with other
            settings or other files.
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
        elif out.is_dir() and any(out.iterdir()):
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
        try:
            content = json.loads(self.file.read_text(encoding="utf-8"))
            before, _ = dotted(content["settings"]), dict(content["cells"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{self.file} is corrupt ({error}): choose another --out, or pass "
                "--overwrite."
            ) from error
        now = dotted(settings)
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
        return content

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
        partial = self.file.with_suffix(".partial")
        text = json.dumps(self.content, indent=1, allow_nan=False) + "\n"
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, self.file)


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
