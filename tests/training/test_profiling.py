"""A trace of some steps, and the table of their operations."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from manifold_lora.console import make_console
from manifold_lora.training.profiling import TABLE, Profiler, costliest


def run(directory: Path | None, steps: int, done: int = 0) -> None:
    """Steps with one product that takes nearly all of the time."""
    x = jnp.ones((600, 600))
    step = jax.jit(lambda x: jnp.sin(x[:2, :2]).sum() + (x @ x) / 600)
    profiler = Profiler(directory, done, make_console())
    for n in range(done, done + steps):
        profiler.before_step(n, x)
        x = step(x)
    profiler.stop(x)


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


def test_nothing_is_traced_unasked(tmp_path: Path):
    run(None, 8)
    run(tmp_path / "short", 3)  # ends before the trace begins
    assert not (tmp_path / "short").exists()
