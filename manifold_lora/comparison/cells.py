"""The file of a comparison: its settings, and every run that has been finished."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from manifold_lora.errors import InputError

FILE, ADAPTERS, TABLE, PICTURE = "compare.json", "adapters", "compare.md", "compare.png"


class Cells:
    """Finished runs by name; whatever is put in is on disk at once.

    Args:
        out: the directory.
        settings: of the comparison, as JSON can hold them.
        overwrite: begin anew instead of going on.

    Raises:
        InputError: the directory holds a comparison with other settings, or something
            that is none, and `overwrite` is off.
    """

    def __init__(self, out: Path, settings: dict[str, Any], overwrite: bool = False):
        self.file = out / FILE
        self.content: dict[str, Any] = {"settings": settings, "cells": {}}
        if out.is_file():
            raise InputError(f"--out {out} is a file: choose a directory.")
        if overwrite:
            self._clear()
        elif self.file.is_file():
            self.content = self._read(settings)
        elif out.is_dir() and any(out.iterdir()):
            raise InputError(
                f"--out {out} is not empty and holds no comparison: choose another "
                "directory, or give --overwrite to write into it."
            )

    def _clear(self) -> None:
        """Take away an earlier comparison, and nothing else."""
        if self.file.is_file():
            shutil.rmtree(self.file.parent / ADAPTERS, ignore_errors=True)
            for name in (FILE, TABLE, PICTURE):
                (self.file.parent / name).unlink(missing_ok=True)

    def _read(self, settings: dict[str, Any]) -> dict[str, Any]:
        try:
            content = json.loads(self.file.read_text(encoding="utf-8"))
            before, _ = flat(content["settings"]), dict(content["cells"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{self.file} is damaged ({error}): choose another --out, or give "
                "--overwrite."
            ) from error
        now = flat(settings)
        changed = [
            f"{k} = {before.get(k, 'unset')} there, {now.get(k, 'unset')} now"
            for k in sorted(before | now)
            if before.get(k) != now.get(k)
        ]
        if changed:
            shown = ", ".join(changed[:6] + ["…"] * (len(changed) > 6))
            raise InputError(
                f"--out {self.file.parent} holds a comparison with other settings "
                f"({shown}). Choose another --out, or give --overwrite to replace it."
            )
        return content

    def __contains__(self, name: str) -> bool:
        return name in self.content["cells"]

    def __getitem__(self, name: str) -> dict[str, Any]:
        return self.content["cells"][name]

    def __setitem__(self, name: str, cell: dict[str, Any]) -> None:
        self.content["cells"][name] = cell
        self.write()

    def write(self) -> None:
        """The whole file, complete or not at all."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        partial = self.file.with_suffix(".partial")
        text = json.dumps(self.content, indent=1, allow_nan=False) + "\n"
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, self.file)


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted names.

    >>> flat({"runs": {"lora": {"rank": 4}}, "seeds": [0]})
    {'runs.lora.rank': 4, 'seeds': [0]}
    """
    found: dict[str, Any] = {}
    for key, value in settings.items():
        inside = isinstance(value, dict) and value
        found |= flat(value, f"{prefix}{key}.") if inside else {prefix + key: value}
    return found
