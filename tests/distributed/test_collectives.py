"""What devices exchange in the compiled programs of a mesh, read from their text."""

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

from manifold_lora.distributed.sharding import keep
from manifold_lora.methods import METHODS
from manifold_lora.planning.hlo import groups_of, read_module
from tests.distributed.cases import (
    CONFIG,
    LENGTH,
    MESHES,
    QUICK,
    Run,
    batch_of,
    model_of,
    on,
)

pytestmark = pytest.mark.mesh

# Large enough for parts of factors to have more entries than r×r matrices, and not in
# blocks of 64 rows that a device could have for itself.
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
Found = tuple[str, tuple[int, ...], tuple[str, ...], tuple[int, ...]]


def collectives(compiled: Any, mesh: Any) -> Iterator[Found]:
    """Kind, entries of each array, axes of the mesh, and the loops around it."""
    module = read_module(compiled.as_text())

    def visit(name: str, loops: tuple[int, ...]) -> Iterator[Found]:
        for line in module.computations[name].values():
            kind = line.kind.removesuffix("-start")
            if kind in KINDS:
                sizes = tuple(int(array.bytes) // 4 for array in line.arrays)
                yield kind, sizes, along(line.rest, mesh), loops
            inside = (module.trips(line),) if line.kind == "while" else ()
            for called in line.called:
                yield from visit(called, loops + inside)

    return visit(module.entry, ())


def along(rest: str, mesh: Any) -> tuple[str, ...]:
    """The axes of the mesh along which devices talk."""
    groups = groups_of(rest, mesh.size)
    places = np.unravel_index(groups, mesh.devices.shape)
    differ = [bool((place != place[:, :1]).any()) for place in places]
    return tuple(n for n, d in zip(mesh.axis_names, differ, strict=True) if d)


@pytest.mark.parametrize("text", [MESHES[0], MESHES[2]])
@pytest.mark.parametrize("method", METHODS)
def test_an_update_exchanges_sums_of_r_by_r_only(method, text):
    model = model_of(method, WIDER)
    with on(text) as mesh:
        run = Run(model)

        def update(grads: Any, state: Any) -> Any:
            updates, opt_state = run.tx.update(grads, state.opt_state, state.factors)
            factors = optax.apply_updates(state.factors, updates)
            return keep((factors, opt_state), run.factors, run.axes)

        compiled = jax.jit(update).lower(run.factors, run.state).compile(QUICK)
    found = [*collectives(compiled, mesh)]
    assert {kind for kind, *_ in found} == {"all-reduce"}
    # Sums over rows: Gram matrices and column norms of all layers, and numbers.
    sizes = {size for _, sizes, *_ in found for size in sizes}
    assert sizes <= {1, LAYERS, LAYERS * RANK, LAYERS * RANK**2}
    tall = [x for x in jax.tree.leaves(run.factors) if x.shape[1] > RANK]
    parts = [x.addressable_shards[0].data.size for x in tall if x.ndim == 3]
    assert max(sizes) < min(parts)  # none of them could be a factor


# The loop over micro-batches is the one of 7 rounds; those of 3 are dropout's keys.
ACCUMULATE = 7


@pytest.mark.parametrize(
    "method, text, explicit",
    [
        ("lora", MESHES[0], False),
        ("stella", MESHES[1], False),
        ("loram_fr", MESHES[2], False),
        ("stiefel_dora", MESHES[2], False),
        ("stiefel_dora", MESHES[2], True),
    ],
)
def test_gradients_are_summed_once_a_step(method, text, explicit):
    model = model_of(method, WIDER)
    model.remat = True
    with on(text, explicit) as mesh:
        assert mesh is not None
        run = Run(model, ACCUMULATE)
        tensor = mesh.shape["tensor"]
        rows = 2 * ACCUMULATE * mesh.size // tensor
        placed = NamedSharding(mesh, P(("data", "fsdp")))
        batch = {
            name: jax.ShapeDtypeStruct((rows, LENGTH), x.dtype, sharding=placed)
            for name, x in batch_of().items()
        }
        step = run.step.lower(run.state, run.frozen, batch).compile(QUICK)
    found = [*collectives(step, mesh)]
    inside = [f for f in found if ACCUMULATE in f[3]]
    outside = [f for f in found if ACCUMULATE not in f[3]]
    # In a layer its frozen weights come together, and activations over the tensor axis.
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
    # Outside of it factors and embeddings come together, but no rows of the batch.
    whole = {x.size // part for x in everything(run) for part in (1, tensor)}
    for kind, sizes, *_ in outside:
        assert kind == "all-reduce" or (kind == "all-gather" and {*sizes} <= whole)
    # Every group's gradients of the factors are summed, each once.
    groups = tuple(a for a in ("data", "fsdp") if mesh.shape[a] > 1)
    summed = sum(
        sum(size for size in sizes if size > LAYERS * RANK**2)
        for kind, sizes, axes, _ in outside
        if kind == "all-reduce" and axes == groups
    )
    factors = jax.tree.leaves(run.factors)
    entries = sum(x.size for x in factors if x.shape[1] > RANK)
    assert math.ceil(entries / tensor) <= summed <= entries


def everything(run: Run) -> list[jax.Array]:
    return jax.tree.leaves(nnx.state(run.model))
