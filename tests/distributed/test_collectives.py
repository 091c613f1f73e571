"""The collectives of programs compiled for a mesh, read from their HLO text."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from jax import P
from jax.sharding import NamedSharding

from manifold_lora.distributed.processes import _sum_over_all_axes
from manifold_lora.distributed.sharding import constrain_to_storage
from manifold_lora.methods import METHODS
from manifold_lora.planning.hlo import groups_of, read_module
from tests.cases import slow_but
from tests.distributed.cases import (
    CONFIG,
    LENGTH,
    MESHES,
    QUICK,
    Run,
    build_model,
    random_batch,
    use_mesh,
)

pytestmark = pytest.mark.mesh

# Large enough for shards of factors to have more entries than r×r matrices, and not a
# multiple of 64 rows, so that no block of rows is local to a device.
WIDER = dataclasses.replace(
    CONFIG, hidden_size=192, intermediate_size=320, head_dim=48, num_hidden_layers=5
)
RANK, LAYERS = 4, WIDER.num_hidden_layers
KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
Collective = tuple[str, tuple[int, ...], tuple[str, ...], tuple[int, ...]]


def collectives(compiled: Any, mesh: Any) -> Iterator[Collective]:
    """Kind, sizes of the arrays, mesh axes, and trip counts of the enclosing loops."""
    module = read_module(compiled.as_text())

    def visit(name: str, loops: tuple[int, ...]) -> Iterator[Collective]:
        for line in module.computations[name].values():
            kind = line.kind.removesuffix("-start")
            if kind in KINDS:
                sizes = tuple(int(array.bytes) // 4 for array in line.arrays)
                yield kind, sizes, mesh_axes(line.rest, mesh), loops
            trips = (module.trip_count(line),) if line.kind == "while" else ()
            for called in line.called:
                yield from visit(called, loops + trips)

    return visit(module.entry, ())


def device_groups(compiled: Any, mesh: Any) -> set[tuple[int, ...]]:
    """The devices of every collective, in the order that makes them a group."""
    module = read_module(compiled.as_text())
    lines = [line for c in module.computations.values() for line in c.values()]
    return {
        tuple(group)
        for line in lines
        if line.kind.removesuffix("-start") in KINDS
        for group in groups_of(line.rest, mesh.size).tolist()
    }


def mesh_axes(rest: str, mesh: Any) -> tuple[str, ...]:
    """The axes of the mesh along which devices communicate."""
    groups = groups_of(rest, mesh.size)
    coordinates = np.unravel_index(groups, mesh.devices.shape)
    differ = [bool((index != index[:, :1]).any()) for index in coordinates]
    return tuple(n for n, d in zip(mesh.axis_names, differ, strict=True) if d)


@pytest.mark.parametrize("text", slow_but([MESHES[2]], [MESHES[0], MESHES[2]]))
@pytest.mark.parametrize(
    "method",
    slow_but(["dora", "stella", "loram_fr", "landing_stiefel", "lora"], METHODS),
)
def test_the_optimizer_all_reduces_r_by_r_matrices_only(method, text):
    model = build_model(method, WIDER)
    with use_mesh(text) as mesh:
        run = Run(model)

        def update(grads: Any, state: Any) -> Any:
            updates, opt_state = run.tx.update(grads, state.opt_state, state.factors)
            factors = optax.apply_updates(state.factors, updates)
            return constrain_to_storage((factors, opt_state), run.factors, run.axes)

        compiled = jax.jit(update).lower(run.factors, run.state).compile(QUICK)
    of_update = [*collectives(compiled, mesh)]
    assert {kind for kind, *_ in of_update} == {"all-reduce"}
    # Sums over rows: Gram matrices and column norms of all layers, and scalars.
    sizes = {size for _, sizes, *_ in of_update for size in sizes}
    assert sizes <= {1, LAYERS, LAYERS * RANK, LAYERS * RANK**2}
    tall = [x for x in jax.tree.leaves(run.factors) if x.shape[1] > RANK]
    shards = [x.addressable_shards[0].data.size for x in tall if x.ndim == 3]
    assert max(sizes) < min(shards)  # none of them could be a factor


# The loop with 7 trips is the one over micro-batches; those with 3 split dropout keys.
ACCUMULATE = 7


@pytest.mark.parametrize(
    "method, text, explicit",
    slow_but(
        [("lora", MESHES[0], False)],
        [
            ("lora", MESHES[0], False),
            ("stella", MESHES[1], False),
            ("loram_fr", MESHES[2], False),
            ("stiefel_dora", MESHES[2], False),
            ("stiefel_dora", MESHES[2], True),
        ],
    ),
)
def test_gradients_are_summed_once_per_step(method, text, explicit):
    model = build_model(method, WIDER)
    model.remat = "block"
    with use_mesh(text, explicit) as mesh:
        assert mesh is not None
        run = Run(model, ACCUMULATE)
        tensor = mesh.shape["tensor"]
        rows = 2 * ACCUMULATE * mesh.size // tensor
        sharding = NamedSharding(mesh, P(("data", "fsdp")))
        batch = {
            name: jax.ShapeDtypeStruct((rows, LENGTH), x.dtype, sharding=sharding)
            for name, x in random_batch().items()
        }
        step = run.step.lower(run.state, run.frozen, batch).compile(QUICK)
    # CPU devices of several processes are connected before they take a step.
    connected = device_groups(_sum_over_all_axes(mesh).lower().compile(), mesh)
    assert set() < device_groups(step, mesh) <= connected
    of_step = [*collectives(step, mesh)]
    inside = [c for c in of_step if ACCUMULATE in c[3]]
    outside = [c for c in of_step if ACCUMULATE not in c[3]]
    # A layer all-gathers its frozen weights, and communicates activations over tensor.
    frozen = nnx.to_flat_state(nnx.state(run.model.layers))
    weights = {
        variable.get_value().size // LAYERS // part
        for _, variable in frozen
        if not isinstance(variable, nnx.LoRAParam)
        for part in (1, tensor)
    }
    for kind, sizes, axes, loops in inside:
        if axes != ("tensor",):
            assert (kind, axes, loops) == ("all-gather", ("fsdp",), (7, LAYERS))
            assert {*sizes} <= weights
    assert any(axes == ("fsdp",) for _, _, axes, _ in inside)
    # Outside, factors and embeddings are all-gathered, but no rows of the batch.
    variables = jax.tree.leaves(nnx.state(run.model))
    gathered = {x.size // part for x in variables for part in (1, tensor)}
    for kind, sizes, *_ in outside:
        assert kind == "all-reduce" or (kind == "all-gather" and {*sizes} <= gathered)
    # The groups' gradients of the factors are summed, each once.
    groups = tuple(a for a in ("data", "fsdp") if mesh.shape[a] > 1)
    summed = sum(
        sum(size for size in sizes if size > LAYERS * RANK**2)
        for kind, sizes, axes, _ in outside
        if kind == "all-reduce" and axes == groups
    )
    factors = jax.tree.leaves(run.factors)
    entries = sum(x.size for x in factors if x.shape[1] > RANK)
    assert math.ceil(entries / tensor) <= summed <= entries
