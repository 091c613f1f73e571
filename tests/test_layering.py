"""Which subpackage may import which: the table of the design."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "manifold_lora"
# Each subpackage with those it may import; itself and these it always may.
EVERYWHERE = {"console", "decoding", "errors", "methods", "settings"}
BELOW = {
    "manifolds": set(),
    "optimizers": {"manifolds"},
    "distributed": set(),
    "models": {"distributed"},
    "adapters": {"manifolds", "optimizers", "distributed", "models"},
    "data": set(),
    "checkpoints": {"manifolds", "distributed", "models", "adapters"},
    "configuration": {"adapters", "distributed", "models"},
}
# A command is a subpackage: it may use all of the above and the commands named here.
COMMANDS = {
    "generation": set(),
    "evaluation": {"generation"},
    "training": {"evaluation", "generation"},
    "inspection": set(),
    "comparison": {"training", "evaluation", "inspection"},
    "planning": {"training"},
    "conversion": set(),
    "cli": {
        *("generation", "evaluation", "training", "comparison", "planning"),
        *("inspection", "conversion"),
    },
}
ALLOWED = BELOW | {name: BELOW.keys() | uses for name, uses in COMMANDS.items()}
# Third parties that a subpackage must not know.
FORBIDDEN = {
    "manifolds": {"optax", "flax"},
    "optimizers": {"flax"},
    "data": {"jax", "flax", "optax"},
    "cli": {"jax", "flax", "optax"},
}


def imports(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield node.module or ""


@pytest.mark.parametrize(
    "subpackage", sorted({file.parent.name for file in PACKAGE.glob("*/*.py")})
)
def test_imports(subpackage):
    allowed = ALLOWED[subpackage] | {subpackage} | EVERYWHERE
    for file in (PACKAGE / subpackage).glob("*.py"):
        for name in imports(file):
            top, *rest = name.split(".")
            if top == "manifold_lora" and rest:
                assert rest[0] in allowed, f"{file.name} imports {name}"
            assert top not in FORBIDDEN.get(subpackage, ()), (
                f"{file.name} imports {name}"
            )


@pytest.mark.parametrize("name", sorted(EVERYWHERE))
def test_what_all_may_import_imports_little(name):
    names = {*imports(PACKAGE / f"{name}.py")}
    assert {n for n in names if n.startswith("manifold_lora")} <= {
        f"manifold_lora.{other}" for other in EVERYWHERE - {name}
    }
    assert not {n.partition(".")[0] for n in names} & {"jax", "flax", "optax", "numpy"}


def test_products_go_through_one_helper():
    for file in (PACKAGE / "manifolds").glob("*.py"):
        if file.name == "linalg.py":
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            assert not isinstance(getattr(node, "op", None), ast.MatMult), file
            if isinstance(node, ast.Attribute):
                assert node.attr not in {"einsum", "dot", "tensordot", "vdot"}, file


def test_files_are_short():
    lengths = {
        str(file.relative_to(PACKAGE)): len(file.read_text().splitlines())
        for file in PACKAGE.rglob("*.py")
    }
    assert {name: n for name, n in lengths.items() if n >= 400} == {}


def test_import_is_light():
    code = (
        "import sys, manifold_lora as ml; ml.Stiefel; ml.riemannian;"
        "heavy = {'transformers', 'orbax', 'grain', 'matplotlib', 'flax', 'rich'};"
        "print(sorted(heavy & {name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_public_names_are_there():
    import manifold_lora as ml

    for name in ml.__all__:
        assert getattr(ml, name).__doc__
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = ml.no_such_name  # pyright: ignore[reportAttributeAccessIssue]
