"""Training and evaluation on meshes of eight devices, compared with one device."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding

from manifold_lora.distributed.arrays import shard_module
from manifold_lora.distributed.sharding import specs_like, storage_spec
from manifold_lora.generation.batched import generate_batches
from manifold_lora.generation.config import GenerationConfig
from manifold_lora.methods import METHODS
from tests.cases import slow_but
from tests.distributed.cases import (
    CONFIG,
    MESHES,
    ROWS,
    Run,
    build_model,
    random_batch,
    shard_batch,
    use_mesh,
)
from tests.tolerances import ADAM, FLOAT32, MOMENTS

pytestmark = pytest.mark.mesh

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    # A rank per layer: the factors get rows that no mesh divides.
    "unequal": {
        "rank_pattern": {"layers.0.self_attn.q_proj": 2, "layers.2.mlp.down_proj": 1}
    },
    "scaled": {"options": {"diagonal_scaling": True}},
}


def steps(run: Run) -> Iterator[tuple[Any, dict[str, float]]]:
    """State and metrics after each of three steps with different batches."""
    state = jax.tree.map(jnp.copy, run.state)
    for seed in range(3):
        before = state
        state, metrics = run.compiled(
            state, run.frozen, shard_batch(random_batch(seed))
        )
        yield state, {name: float(value) for name, value in metrics.items()}
        assert all(x.is_deleted() for x in jax.tree.leaves(before)), "not donated"


@functools.cache
def on_one_device(method: str, options: str) -> Any:
    """States and metrics of one device, without accumulation."""
    run = Run(build_model(method, **OPTIONS[options]))
    return [(jax.tree.map(to_numpy, state), m) for state, m in steps(run)]


def to_numpy(x: jax.Array) -> np.ndarray:
    is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return np.array(jax.random.key_data(x) if is_key else x)


def assert_close(actual: Any, expected: Any, scale: Any, tolerance: float) -> None:
    """Compare leaf by leaf, relative to the largest entry of the leaf of `scale`."""
    leaves = zip(*map(jax.tree.leaves, (actual, expected, scale)), strict=True)
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(actual)]
    for path, (x, y, unit) in zip(paths, leaves, strict=True):
        error = np.abs(to_numpy(x) - y).max() / np.abs(unit).max()
        assert error <= tolerance, (jax.tree_util.keystr(path), error)


def check_steps(
    method: str,
    text: str,
    accumulate: int,
    explicit: bool = False,
    options: str = "plain",
) -> None:
    """Three steps on a mesh equal those of one device; the state stays sharded."""
    model = build_model(method, **OPTIONS[options])
    on_one_device(method, options)  # outside of the mesh
    with use_mesh(text, explicit) as mesh:
        assert mesh is not None
        run = Run(model, accumulate)
        specs = (
            jax.tree.map(
                lambda x, a: storage_spec(a, x.shape, mesh), run.factors, run.axes
            ),
            specs_like(run.state.opt_state, run.factors, run.axes, mesh),
        )
        initial = jax.tree.map(np.array, run.factors)
        pairs = zip(steps(run), on_one_device(method, options), strict=True)
        state, expected = run.state, run.state
        for number, ((state, metrics), (expected, metrics_expected)) in enumerate(
            pairs
        ):
            for name in ("loss", "tokens"):
                assert metrics[name] == pytest.approx(
                    metrics_expected[name], rel=FLOAT32
                )
            norms = (metrics["grad_norm"], metrics_expected["grad_norm"])
            assert norms[0] == pytest.approx(norms[1], rel=ADAM if number else FLOAT32)
            if number == 0:
                # The moments are the gradients or their squares, times 1 − β. Some
                # are zero up to rounding, hence the 1e-6.
                scale = jax.tree.map(lambda y: np.abs(y) + 1e-6, expected.opt_state)
                assert_close(state.opt_state, expected.opt_state, scale, MOMENTS)
            # The dropout key of the next step.
            np.testing.assert_array_equal(to_numpy(state.key), expected.key)
            assert_sharded(state[:2], specs, mesh, explicit)
    change = jax.tree.map(np.subtract, expected.factors, initial)
    assert_close(state.factors, expected.factors, change, ADAM)


def assert_sharded(state: Any, specs: Any, mesh: Any, explicit: bool) -> None:
    specs = jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, jax.P))
    for x, spec in zip(jax.tree.leaves(state), specs, strict=True):
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, spec), x.ndim)
        kind = jax.typeof(x).sharding
        if explicit:
            assert {*kind.mesh.axis_types} == {AxisType.Explicit}
            assert tuple(kind.spec) == (*spec, *[None] * (x.ndim - len(spec)))
        else:
            assert {*kind.mesh.axis_types} <= {AxisType.Auto}


# A method of each kind of factors on every mesh, with every optimiser among them; the
# others on the mesh that shards over all axes.
REPRESENTATIVES = ("stiefel_dora", "stella", "loram_fr", "loram_br", "landing_oblique")
CASES = [
    *((method, MESHES[0], 1) for method in REPRESENTATIVES),
    *((method, MESHES[1], 2) for method in REPRESENTATIVES),
    *((method, MESHES[2], 2) for method in METHODS),
    ("stella", MESHES[0], 2),
    ("stella", MESHES[1], 1),
]
QUICK = [
    ("landing_oblique", MESHES[0], 1),
    ("loram_br", MESHES[1], 2),
]
SMOKE = pytest.param("stella", MESHES[2], 1, marks=pytest.mark.smoke)


@pytest.mark.parametrize("method, text, accumulate", [SMOKE, *slow_but(QUICK, CASES)])
def test_steps_on_a_mesh_equal_one_device(method, text, accumulate):
    check_steps(method, text, accumulate)


@pytest.mark.parametrize(
    "method, text",
    slow_but(
        [("stella", MESHES[2])],
        [
            *(("stella", text) for text in MESHES),
            ("stiefel_dora", MESHES[2]),
            ("loram_br", MESHES[2]),
        ],
    ),
)
def test_steps_with_explicit_axes(method, text):
    check_steps(method, text, 2, explicit=True)


@pytest.mark.parametrize(
    "method, text, options",
    [
        pytest.param("stiefel", "fsdp=8", "unequal", marks=pytest.mark.slow),
        pytest.param(
            "landing_oblique",
            "data=2,fsdp=2,tensor=2",
            "unequal",
            marks=pytest.mark.slow,
        ),
        ("lora", "data=2,fsdp=2,tensor=2", "scaled"),
    ],
)
def test_steps_of_uncommon_adapters(method, text, options):
    check_steps(method, text, 2, options=options)


@pytest.mark.parametrize("text", MESHES)
@pytest.mark.parametrize("explicit", slow_but([False], [False, True]))
def test_evaluation_on_a_mesh_equals_one_device(text, explicit, quick_compilation):
    model, batch = build_model("stella"), partly_answered()
    one = Run(model)
    expected = one.evaluate(one.factors, one.frozen, [batch, random_batch()])
    assert 0 < expected.accuracy < 1
    with use_mesh(text, explicit):
        run = Run(model)
        batches = [shard_batch(batch), shard_batch(random_batch())]
        evaluation = run.evaluate(run.factors, run.frozen, batches)
    assert evaluation.loss == pytest.approx(expected.loss, rel=FLOAT32)
    assert evaluation.accuracy == expected.accuracy


def partly_answered() -> dict[str, np.ndarray]:
    """A batch with the last token as target, which the model predicts in odd rows."""
    batch, model = random_batch(7), build_model("stella")
    batch["loss_mask"] *= 0
    last = batch["segment_ids"].sum(1) - 1
    logits = np.asarray(model(jnp.asarray(batch["input_ids"])))
    for row in range(ROWS):
        batch["loss_mask"][row, last[row]] = 1
        if row % 2:
            batch["input_ids"][row, last[row]] = logits[row, last[row] - 1].argmax()
    return batch


# The number of rows is not a multiple of the number of groups.
@pytest.mark.parametrize(
    "text, count", slow_but([(MESHES[0], 1)], [(MESHES[0], 1), (MESHES[2], 5)])
)
def test_completions_on_a_mesh_equal_one_device(text, count, quick_compilation, capfd):
    rng = np.random.default_rng(1)
    lengths = rng.integers(1, 6, count)
    prompts = [rng.integers(0, CONFIG.vocab_size, n).tolist() for n in lengths]
    model = build_model("stella")

    def completions(stop: tuple[int, ...]) -> list[list[int]]:
        config = GenerationConfig(max_new_tokens=4)
        made = generate_batches(model, prompts, config, stop_tokens=stop, batch_size=3)
        return [tokens for _, tokens in sorted(made)]

    expected = completions(())
    assert [len(c) for c in expected] == [4] * count
    for ids, tokens in zip(prompts, expected, strict=True):  # token by token
        for n, token in enumerate(tokens):
            known = jnp.array([[*ids, *tokens[:n]]])
            assert np.asarray(model(known))[0, -1].argmax() == token
    stop = expected[0][2]
    with use_mesh(text):
        shard_module(model)
        assert completions(()) == expected
        assert completions((stop,)) == [
            c[: c.index(stop)] if stop in c else c for c in expected
        ]
    assert "rematerialization" not in capfd.readouterr().err
