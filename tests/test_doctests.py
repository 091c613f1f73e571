"""The examples in docstrings run."""

import doctest
import importlib
import pkgutil

import pytest

import manifold_lora

pytestmark = pytest.mark.smoke
MODULES = [
    module.name
    for module in pkgutil.walk_packages(manifold_lora.__path__, "manifold_lora.")
    if not module.ispkg
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    if name == "manifold_lora.evaluation.harness":
        pytest.importorskip("lm_eval")
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0
