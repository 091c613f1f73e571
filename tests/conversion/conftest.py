"""The base of the tests, in files."""

import json
from pathlib import Path

import pytest

from tests import adapters as tiny
from tests.models import reference


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "model"
    config = tiny.CONFIG | {"tie_word_embeddings": False}  # which mlx-lm assumes not
    return reference.write_checkpoint(path, config, tiny.TENSORS)


@pytest.fixture(scope="session")
def heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base without its weights."""
    path = tmp_path_factory.mktemp("heads")
    (path / "config.json").write_text(json.dumps(tiny.CONFIG))
    return path
