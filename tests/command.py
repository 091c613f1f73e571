"""The command in processes of its own, on so many CPU devices each."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from tests.compilation import xla_flags

# Importing Matplotlib and drawing a picture takes a quarter of a short run.
CODE = """
import sys
from pathlib import Path
from unittest.mock import MagicMock
figure = MagicMock()
figure.Figure.return_value.savefig = lambda path: Path(path).write_bytes(b"PNG")
sys.modules |= {"matplotlib": MagicMock(), "matplotlib.figure": figure}
from manifold_lora.cli.main import main
main()
"""
_started: list[subprocess.Popen[str]] = []


def start(*arguments: Any, devices: int = 1, **env: str) -> subprocess.Popen[str]:
    """`manifold-lora` with these arguments, running; compiled quickly, not well."""
    flags = {"XLA_FLAGS": xla_flags(devices), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", CODE, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | flags | env,
    )
    _started.append(process)
    return process


def end(process: subprocess.Popen[str], seconds: float = 200) -> tuple[int, str]:
    """Its exit code and what it printed."""
    try:
        output, _ = process.communicate(timeout=seconds)
    finally:
        process.kill()
    return process.returncode, output


def kill_all() -> None:
    """Kill what a failed test has left running, which would outlive it."""
    while _started:
        with _started.pop() as process:
            process.kill()


def wait(condition: Callable[[], bool], seconds: float = 200) -> None:
    """Until the condition holds."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited too long"
        time.sleep(0.01)


def flags(settings: dict[str, Any]) -> list[str]:
    """Settings as flags of the command."""
    found = []
    for name, value in settings.items():
        found.append("--" + name.replace("_", "-"))
        found += [*map(str, value)] if isinstance(value, tuple) else [str(value)]
    return found
