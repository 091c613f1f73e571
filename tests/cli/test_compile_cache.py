"""Compiled programs are kept where the user's cache is, unless told otherwise."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from manifold_lora.cli.compile_cache import processor

CODE = """
import os, sys
from manifold_lora.cli.main import main
try: main(sys.argv[1:])
except SystemExit: pass
print("cache:", os.environ.get("JAX_COMPILATION_CACHE_DIR"))
"""


def directory(home: Path, *arguments: str, command: str = "methods", **env: str) -> str:
    """Where the command keeps programs."""
    inherited = {
        k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"
    }
    done = subprocess.run(
        [sys.executable, "-c", CODE, command, *arguments],
        env=inherited | {"XDG_CACHE_HOME": str(home), "HOME": str(home)} | env,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.rpartition("cache: ")[2].strip()


@pytest.mark.skipif(sys.platform != "linux", reason="caches are elsewhere there")
def test_where_programs_are_kept(tmp_path: Path):
    needed = tmp_path / "manifold-lora" / f"jax-{processor()}"
    assert directory(tmp_path) == str(needed) and needed.is_dir()
    given = str(tmp_path / "mine")
    assert directory(tmp_path, JAX_COMPILATION_CACHE_DIR=given) == given
    assert directory(tmp_path, "--no-compile-cache") == "None"
    # What is compiled for devices that are not there cannot be read again.
    assert directory(tmp_path, "--help", command="plan") == "None"
    (tmp_path / "file").touch()
    assert directory(tmp_path / "file") == "None"  # no directory can be made there
