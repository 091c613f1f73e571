"""Training and evaluation on meshes of eight devices against one device."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding

from manifold_lora.data.tokens import Example
from manifold_lora.distributed.sharding import follow, kept
from manifold_lora.evaluation.heldout import complete
from manifold_lora.methods import METHODS
from tests.distributed.cases import (
    CONFIG,
    MESHES,
    ROWS,
    Run,
    batch_of,
    fed,
    model_of,
    on,
)
from tests.tolerances import ADAM, FLOAT32, MOMENTS

pytestmark = pytest.mark.mesh

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    # Layers of ranks of their own: factors get rows that no mesh divides.
    "unequal": {
        "rank_pattern": {"layers.0.self_attn.q_proj": 2, "layers.2.mlp.down_proj": 1}
    },
    "scaled": {"diagonal_scaling": True},
}


def steps(run: Run) -> Iterator[tuple[Any, dict[str, float]]]:
    """The state after each of three steps with batches of their own, and metrics."""
    state = jax.tree.map(jnp.copy, run.state)
    for seed in range(3):
        before = state
        state, metrics = run.compiled(state, run.frozen, fed(batch_of(seed)))
        yield state, {name: float(value) for name, value in metrics.items()}
        assert all(x.is_deleted() for x in jax.tree.leaves(before)), "not donated"


@functools.cache
def alone(method: str, options: str) -> Any:
    """States and metrics of one device, which takes each batch in one part."""
    run = Run(model_of(method, **OPTIONS[options]))
    return [(jax.tree.map(to_numpy, state), m) for state, m in steps(run)]


def to_numpy(x: jax.Array) -> np.ndarray:
    is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return np.array(jax.random.key_data(x) if is_key else x)


def close(got: Any, needed: Any, sizes: Any, tolerance: float) -> None:
    """Every leaf to rounding, relative to the largest entry of the leaf of `sizes`."""
    leaves = zip(*map(jax.tree.leaves, (got, needed, sizes)), strict=True)
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(got)]
    for path, (x, y, size) in zip(paths, leaves, strict=True):
        error = np.abs(to_numpy(x) - y).max() / np.abs(size).max()
        assert error <= tolerance, (jax.tree_util.keystr(path), error)


def check(
    method: str,
    text: str,
    accumulate: int,
    explicit: bool = False,
    options: str = "plain",
) -> None:
    """Three steps on a mesh are those of one device; the state stays in its place."""
    model = model_of(method, **OPTIONS[options])
    alone(method, options)  # outside of the mesh
    with on(text, explicit) as mesh:
        assert mesh is not None
        run = Run(model, accumulate)
        expected = (
            jax.tree.map(lambda x, a: kept(a, x.shape, mesh), run.factors, run.axes),
            follow(run.state.opt_state, run.factors, run.axes, mesh),
        )
        start = jax.tree.map(np.array, run.factors)
        pairs = zip(steps(run), alone(method, options), strict=True)
        state, needed = run.state, run.state
        for number, ((state, metrics), (needed, metrics_needed)) in enumerate(pairs):
            for name in ("loss", "tokens"):
                assert metrics[name] == pytest.approx(metrics_needed[name], rel=FLOAT32)
            norms = (metrics["grad_norm"], metrics_needed["grad_norm"])
            assert norms[0] == pytest.approx(norms[1], rel=ADAM if number else FLOAT32)
            if number == 0:
                # The moments are the gradients, times 1 − β or squared times as much.
                # Some are zero but for rounding, which 1e-6 keeps away.
                sizes = jax.tree.map(lambda y: np.abs(y) + 1e-6, needed.opt_state)
                close(state.opt_state, needed.opt_state, sizes, MOMENTS)
            # The key of the next step's dropout.
            np.testing.assert_array_equal(to_numpy(state.key), needed.key)
            in_place(state[:2], expected, mesh, explicit)
    moved = jax.tree.map(np.subtract, needed.factors, start)
    close(state.factors, needed.factors, moved, ADAM)


def in_place(state: Any, expected: Any, mesh: Any, explicit: bool) -> None:
    specs = jax.tree.leaves(expected, is_leaf=lambda x: isinstance(x, jax.P))
    for x, spec in zip(jax.tree.leaves(state), specs, strict=True):
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, spec), x.ndim)
        kind = jax.typeof(x).sharding
        if explicit:
            assert {*kind.mesh.axis_types} == {AxisType.Explicit}
            assert tuple(kind.spec) == (*spec, *[None] * (x.ndim - len(spec)))
        else:
            assert {*kind.mesh.axis_types} <= {AxisType.Auto}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("text", MESHES)
@pytest.mark.parametrize("method", METHODS)
def test_steps_of_a_mesh_are_those_of_one_device(method, text, accumulate):
    check(method, text, accumulate)


@pytest.mark.parametrize("text", MESHES)
@pytest.mark.parametrize("method", ["stiefel_dora", "stella", "loram_br"])
def test_steps_with_explicit_axes(method, text):
    check(method, text, 2, explicit=True)


@pytest.mark.parametrize(
    "method, text, options",
    [
        ("stiefel", "fsdp=8", "unequal"),
        ("landing_oblique", "data=2,fsdp=2,tensor=2", "unequal"),
        ("lora", "data=2,fsdp=2,tensor=2", "scaled"),
    ],
)
def test_steps_of_uncommon_adapters(method, text, options):
    check(method, text, 2, options=options)


@pytest.mark.parametrize("text", MESHES)
@pytest.mark.parametrize("explicit", [False, True])
def test_evaluation_of_a_mesh_is_that_of_one_device(text, explicit, quick_compilation):
    model, batch = model_of("stella"), answered()
    one = Run(model)
    needed = one.evaluate(one.factors, one.frozen, [batch, batch_of()])
    assert 0 < needed.accuracy < 1
    with on(text, explicit):
        run = Run(model)
        batches = [fed(batch), fed(batch_of())]
        found = run.evaluate(run.factors, run.frozen, batches)
    assert found.loss == pytest.approx(needed.loss, rel=FLOAT32)
    assert found.accuracy == needed.accuracy


def answered() -> dict[str, np.ndarray]:
    """A batch whose last tokens are the answers; the model gives those of odd rows."""
    batch, model = batch_of(7), model_of("stella")
    batch["loss_mask"] *= 0
    last = batch["segment_ids"].sum(1) - 1
    logits = np.asarray(model(jnp.asarray(batch["input_ids"])))
    for row in range(ROWS):
        batch["loss_mask"][row, last[row]] = 1
        if row % 2:
            batch["input_ids"][row, last[row]] = logits[row, last[row] - 1].argmax()
    return batch


# No number of groups divides the rows.
@pytest.mark.parametrize("text, count", [(MESHES[0], 1), (MESHES[2], 5)])
def test_completions_of_a_mesh_are_those_of_one_device(
    text, count, quick_compilation, capfd
):
    rng = np.random.default_rng(1)
    examples = [
        Example(rng.integers(0, CONFIG.vocab_size, 6).astype(np.int32), mask)
        for mask in np.arange(6) >= rng.integers(1, 6, (count, 1))
    ]
    model = model_of("stella")

    def completed(run: Run, stop: int, new: int = 4) -> list[list[int]]:
        given = (run.factors, run.frozen, examples, [stop], new)
        return complete(run.rebuild, run.axes, *given)

    one = Run(model)
    needed = completed(one, -1)
    assert [len(c) for c in needed] == [4] * count
    for example, tokens in zip(examples, needed, strict=True):  # token by token
        ids = example.input_ids[: example.loss_mask.argmax()].tolist()
        for token in tokens:
            assert np.asarray(model(jnp.array([ids])))[0, -1].argmax() == token
            ids.append(token)
    stop = needed[0][2]
    with on(text):
        run = Run(model)
        assert completed(run, -1) == needed
        assert completed(run, stop) == [
            c[: c.index(stop)] if stop in c else c for c in needed
        ]
    assert "rematerialization" not in capfd.readouterr().err
