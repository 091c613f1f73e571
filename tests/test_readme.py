"""What the README prints is what is there."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks():
    """The indented blocks of the README."""
    indented = re.findall(r"(?:^(?: {4}.*)?\n)+", README, re.MULTILINE)
    return [re.sub("^ {4}", "", block, flags=re.MULTILINE) for block in indented]


def test_ci_runs_the_tests_as_printed():
    (test,) = (block for block in blocks() if "bin/pytest" in block)
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert all(f"\n{part.strip()}\n" in ci for part in test.split("&&"))


def test_the_optax_example_runs():
    (code,) = (block for block in blocks() if "ml.riemannian(" in block)
    names = {}
    exec(code, names)
    names["tx"].init(names["params"])


def test_named_files_are_there():
    for name in re.findall(r"`((?:examples|benchmarks|tests)/[\w./]+)`", README):
        assert (ROOT / name).exists(), name
    package = ROOT / "manifold_lora"
    for name in re.findall(r"`(\w+/\w+\.py)`", README):
        assert (package / name).exists() or (ROOT / name).exists(), name
