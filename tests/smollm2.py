"""A real pretrained LLaMA for the tests marked `real`: SmolLM2-135M-Instruct.

`MANIFOLD_LORA_SMOLLM2` names its Hugging Face directory; without it, the shared script
that makes the directory is run once and its result cached.
"""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.compilation import cache_directory

SHARED = Path(__file__).parents[2] / "shared"
SCRIPT = SHARED / "tools" / "smollm2.py"
COMMONSENSE = SHARED / "data" / "commonsense"


@cache
def directory() -> Path:
    """The model's directory, or a skip that says why there is none."""
    given = os.environ.get("MANIFOLD_LORA_SMOLLM2")
    path = Path(given or Path(cache_directory()).parent / "smollm2")
    if (path / "config.json").is_file():
        return path
    if given:
        pytest.skip(f"MANIFOLD_LORA_SMOLLM2={given} has no config.json")
    if not SCRIPT.is_file():
        pytest.skip("needs SmolLM2: set MANIFOLD_LORA_SMOLLM2 to its directory")
    command = [sys.executable, str(SCRIPT), str(path)]
    made = subprocess.run(command, capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"SmolLM2 cannot be made: {made.stderr.strip()[-200:]}")
    return path


def commonsense() -> Path:
    """The directory of the commonsense benchmark files, or a skip."""
    if not COMMONSENSE.is_dir():
        pytest.skip("needs the commonsense records beside the repository")
    return COMMONSENSE
