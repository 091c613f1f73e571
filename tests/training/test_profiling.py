"""A trace of some steps, and the table of their operations."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from manifold_lora.console import make_console
from manifold_lora.errors import InputError
from manifold_lora.training.profiling import (
    TABLE,
    Profiler,
    check_directory,
    costliest,
)


def run(directory: Path | None, steps: int, done: int = 0) -> None:
    """Steps with one product that takes nearly all of the time."""
    x = jnp.ones((600, 600))
    step = jax.jit(lambda x: jnp.sin(x[:2, :2]).sum() + (x @ x) / 600)
    profiler = Profiler(directory, done, make_console())
    for n in range(done, done + steps):
        profiler.before_step(n, x)
        x = step(x)
    profiler.finish(done + steps, x)


@pytest.mark.parametrize("steps, done", [(8, 0), (5, 2)])
def test_the_costliest_operation(capsys, tmp_path: Path, steps, done):
    run(tmp_path / "trace", steps, done)
    (trace,) = (tmp_path / "trace").glob("plugins/profile/*/*.xplane.pb")
    first, *others = costliest(trace)
    assert "dot" in first.name or "fusion" in first.name
    assert first.calls == min(3, steps - 3)
    assert first.share > 0.5
    assert first.share + sum(each.share for each in others) <= 1 + 1e-9
    text = (tmp_path / "trace" / TABLE).read_text()
    assert text.count("\n") == 3 + len(others)
    assert first.name in capsys.readouterr().out and first.name in text


def test_nothing_is_traced(capsys, tmp_path: Path):
    run(None, 8)
    assert capsys.readouterr().out == ""
    run(tmp_path / "short", 3)  # ends before the trace begins
    assert "nothing was traced" in capsys.readouterr().out
    assert not (tmp_path / "short").exists()


def test_a_directory_that_cannot_be(capsys, tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="--profile .*file/x cannot be made"):
        check_directory(tmp_path / "file" / "x")
    run(tmp_path / "file", 8)  # nor ends it a run that has begun
    assert "the trace was not written" in capsys.readouterr().out
