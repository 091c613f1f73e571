"""Adapters in files for the tests of merge, import and convert."""

from pathlib import Path
from typing import Any

import pytest

from manifold_lora.adapters import AdapterConfig, attach
from manifold_lora.checkpoints.peft import save_adapter
from manifold_lora.cli.main import main
from manifold_lora.models import Llama
from tests import adapters as tiny
from tests.adapters.cases import CASES, config
from tests.models import reference

# all that files can hold
HELD = [case for case in CASES if not case.endswith("diagonal_scaling=True")]


def model_directory(path: Path, shards: int = 1, **changed: Any) -> Path:
    """The base of the tests."""
    return reference.write_checkpoint(path, tiny.CONFIG | changed, tiny.TENSORS, shards)


def adapter(path: Path, what: AdapterConfig | str, seed: int = 0) -> Llama:
    """A model with a random adapter, which is saved."""
    model = tiny.base()
    attach(model, config(what) if isinstance(what, str) else what)
    save_adapter(tiny.randomize(model, seed), path, base_id="base")
    return model


def command(
    capsys: pytest.CaptureFixture[str], *arguments: Any, code: int | None = None
) -> str:
    """What the command prints, on one line, with the exit code it must have."""
    ended = None
    try:
        main([*map(str, arguments)])
    except SystemExit as error:
        ended = error.code
    assert (ended or None) == code
    return " ".join("".join(capsys.readouterr()).split())
