"""Adapters in files for the tests of merge, import and convert."""

from pathlib import Path
from typing import Any

import pytest

from manifold_lora.adapters import AdapterConfig, attach
from manifold_lora.adapters.options import inits
from manifold_lora.checkpoints.peft import save_adapter
from manifold_lora.cli.main import main
from manifold_lora.methods import METHODS
from manifold_lora.models import Llama
from tests import adapters as tiny
from tests.adapters.cases import FEW, config
from tests.models import reference

# Every method that files can hold, and every other form of its factors.
HELD = [f"{method}-{inits(method)[0]}" for method in METHODS]
HELD += ["lora-pissa", "stella-diagonal_s=True"]


def model_directory(path: Path, shards: int = 1, **changed: Any) -> Path:
    """The base of the tests."""
    return reference.write_checkpoint(path, tiny.CONFIG | changed, tiny.TENSORS, shards)


def adapter(path: Path, what: AdapterConfig | str, seed: int = 0) -> Llama:
    """A model with a random adapter, which is saved."""
    model = tiny.base()
    attach(model, config(what, targets=FEW) if isinstance(what, str) else what)
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
