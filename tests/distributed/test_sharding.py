"""Shardings on the mesh: a table of specs, and properties that hold for all arrays."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import P
from jax.sharding import NamedSharding

from manifold_lora.adapters import axes, factors
from manifold_lora.distributed.arrays import (
    BatchSharder,
    init_sharded,
    shard_module,
    to_host,
)
from manifold_lora.distributed.sharding import (
    compute_spec,
    logical_axes,
    specs_like,
    storage_spec,
)
from manifold_lora.methods import METHODS
from tests.cases import slow_but
from tests.distributed.cases import (
    MESHES,
    ROWS,
    Run,
    build_mesh,
    build_model,
    random_batch,
    use_mesh,
)

pytestmark = pytest.mark.mesh

ALL = ("fsdp", "tensor")
TENSOR_FIRST = ("tensor", "fsdp")
BATCH = ("data", "fsdp")
# Logical axes, shape, and the storage spec on each of MESHES.
STORAGE = {
    "kernel of q_proj": (
        ("layers", "embed", "heads"),
        (3, 32, 32),
        [P(None, "fsdp", None), P(None, "fsdp", None), P(None, "fsdp", "tensor")],
    ),
    "kernel of down_proj": (
        ("layers", "mlp", "embed"),
        (3, 48, 32),
        [P(None, None, "fsdp"), P(None, None, "fsdp"), P(None, "tensor", "fsdp")],
    ),
    "bias of q_proj": (
        ("layers", "heads"),
        (3, 32),
        [P(None, None), P(None, None), P(None, "tensor")],
    ),
    "embedding, vocabulary of 61": (
        ("vocab", "embed"),
        (61, 32),
        [P(None, "fsdp"), P(None, "fsdp"), P(None, "fsdp")],
    ),
    "embedding, vocabulary of 64": (
        ("vocab", "embed"),
        (64, 32),
        [P(None, "fsdp"), P(None, "fsdp"), P("tensor", "fsdp")],
    ),
    "kernel of 36 inputs": (
        ("layers", "embed", "mlp"),
        (8, 36, 45),
        [P(None, None, None), P(None, "fsdp", None), P(None, "fsdp", None)],
    ),
    "norm": ((None, None), (8, 32), [P(None, None)] * 3),
    "factor on embed": (
        ("layers", "embed", "rank"),
        (8, 32, 8),
        [P(None, "fsdp", None), P(None, "fsdp", None), P(None, ALL, None)],
    ),
    "factor on heads": (
        ("layers", "heads", "rank"),
        (8, 32, 8),
        [P(None, "fsdp", None), P(None, "fsdp", None), P(None, TENSOR_FIRST, None)],
    ),
    "factor on mlp, 34 rows": (
        ("layers", "mlp", "rank"),
        (8, 34, 8),
        [P(None, None, None), P(None, "fsdp", None), P(None, "tensor", None)],
    ),
    "factor on mlp, 33 rows": (
        ("layers", "mlp", "rank"),
        (8, 33, 8),
        [P(*[None] * 3)] * 3,
    ),
    "S": (("layers", "rank", "rank"), (8, 8, 8), [P(None, None, None)] * 3),
    "batch": (("batch", None), (16, 6), [P("fsdp", None), *[P(BATCH, None)] * 2]),
    "batch of 2 rows": (
        ("batch", None),
        (2, 6),
        [P(None, None), P(None, None), P("data", None)],
    ),
}
# Compute specs: only the batch is sharded over fsdp.
COMPUTE = {
    "kernel of q_proj": [P(None, None, None)] * 2 + [P(None, None, "tensor")],
    "kernel of down_proj": [P(None, None, None)] * 2 + [P(None, "tensor", None)],
    "embedding, vocabulary of 61": [P(None, None)] * 3,
    "embedding, vocabulary of 64": [P(None, None)] * 2 + [P("tensor", None)],
    "factor on embed": [P(None, None, None)] * 3,
    "factor on heads": [P(None, None, None)] * 2 + [P(None, "tensor", None)],
    "batch": [P("fsdp", None)] + [P(BATCH, None)] * 2,
}


@pytest.mark.parametrize("case", STORAGE)
def test_storage_spec(case):
    axes, shape, expected = STORAGE[case]
    assert [storage_spec(axes, shape, build_mesh(text)) for text in MESHES] == expected


@pytest.mark.parametrize("case", COMPUTE)
def test_compute_spec(case):
    axes, shape, _ = STORAGE[case]
    assert [compute_spec(axes, shape, build_mesh(text)) for text in MESHES] == COMPUTE[
        case
    ]


def shard_counts(spec, mesh):
    """The number of shards along each dimension, and all mesh axes in the spec."""
    entries = [(a,) if isinstance(a, str) else a or () for a in spec]
    counts = [math.prod(mesh.shape[a] for a in entry) for entry in entries]
    return counts, sum(entries, ())


@pytest.mark.parametrize("text", slow_but([MESHES[2]], MESHES))
@pytest.mark.parametrize("method", METHODS)
def test_shard_module_shards_every_variable(method, text):
    mesh, model = build_mesh(text), build_model(method)
    shards = mesh.shape["fsdp"] * mesh.shape["tensor"]
    before = {
        path: np.asarray(variable.get_value())
        for path, variable in nnx.to_flat_state(nnx.state(model))
    }
    with jax.set_mesh(mesh):
        shard_module(model)
    sharded = set()
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        x, axis_names = variable.get_value(), logical_axes(variable)
        spec = storage_spec(axis_names, x.shape, mesh)
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, spec), x.ndim), path
        np.testing.assert_array_equal(np.asarray(x), before[path])
        counts, mesh_axes = shard_counts(spec, mesh)
        assert len(set(mesh_axes)) == len(mesh_axes), path
        assert "data" not in mesh_axes, path
        count = x.nbytes // x.addressable_shards[0].data.nbytes
        assert count == math.prod(counts)
        kernel = path[-1] == "kernel" and path[-2] != "lm_head"
        factor = isinstance(variable, nnx.LoRAParam) and axis_names.count("rank") == 1
        if kernel or factor:
            sharded.add(path[-1])
            assert count == shards, path
        if "rank" in axis_names or "layers" in axis_names:
            assert counts[0] == 1, path
    assert "kernel" in sharded and len(sharded) >= 3


def leaves(tree):
    """The leaves of a tree, by path."""
    flat = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in flat}


@pytest.mark.parametrize("text", MESHES)
@pytest.mark.parametrize("method", METHODS)
def test_moments_are_sharded_like_their_factors(method, text):
    model = build_model(method)
    with use_mesh(text):
        state = Run(model).state
    by_path, moments = leaves(state.factors), 0
    for path, x in leaves(state.opt_state).items():
        (factor,) = [f for end, f in by_path.items() if path.endswith(end)] or [None]
        if factor is None:
            assert x.shape == () and x.sharding.is_fully_replicated, path
            continue
        moments += 1
        # A moment of the factor's shape has its sharding; a single column, its rows.
        shape = [n if n == m else 1 for n, m in zip(factor.shape, x.shape, strict=True)]
        assert tuple(shape) == x.shape
        shard = factor.sharding.shard_shape(factor.shape)
        expected = [
            p if n == m else m
            for p, n, m in zip(shard, factor.shape, x.shape, strict=True)
        ]
        assert list(x.sharding.shard_shape(x.shape)) == expected, path
        rows = factor.sharding.devices_indices_map(factor.shape)
        for device, index in x.sharding.devices_indices_map(x.shape).items():
            assert index[1] == rows[device][1], path
    assert moments == 2 * len(by_path)


def test_moments_of_two_learning_rates():
    model = build_model("stiefel")
    with use_mesh(MESHES[2]):
        state = Run(model).state
    opt_state: Any = state.opt_state
    inner = opt_state[1].inner_states
    for label, name, rows in (
        ("constrained", "b", P(None, ("tensor", "fsdp"), None)),
        ("free", "a", P(None, ("fsdp", "tensor"), None)),
    ):
        adam = inner[label].inner_state[0]
        q_proj = adam.nu["layers"]["self_attn"]["q_proj"]
        other = q_proj["a" if name == "b" else "b"]
        assert q_proj[name].sharding.spec == rows
        assert not jax.tree.leaves(other)


def test_second_moments_per_row():
    model = build_model("loram_fr")
    with use_mesh(MESHES[2]):
        state = Run(model).state
    opt_state: Any = state.opt_state
    adam = opt_state[1][0].inner_states["constrained"].inner_state
    q_proj = adam.nu["layers"]["self_attn"]["q_proj"]
    assert q_proj["u"].shape == (3, 32, 1)
    assert q_proj["u"].sharding.spec == P(None, ("tensor", "fsdp"), None)
    assert q_proj["s"].shape == (3, 1, 1)
    assert q_proj["s"].sharding.is_fully_replicated


def test_specs_like_matches_the_end_of_the_path():
    mesh = build_mesh(MESHES[2])
    shape = jax.ShapeDtypeStruct((3, 32, 4), jnp.float32)
    params = {"q": {"a": shape, "b": shape}}
    axes_tree = {
        "q": {"a": ("layers", "embed", "rank"), "b": ("layers", "heads", "rank")}
    }
    flat = jax.ShapeDtypeStruct((96,), jnp.float32)
    column = jax.ShapeDtypeStruct((3, 32, 1), jnp.float32)
    row = jax.ShapeDtypeStruct((3, 1, 4), jnp.float32)
    tree = {
        "mu": (params,),
        "nu": {"q": {"a": column, "b": row}},
        "q": {"a": flat, "c": shape},  # other number of dimensions; not a parameter
        "a": shape,
        "count": jax.ShapeDtypeStruct((), jnp.int32),
    }
    assert specs_like(tree, params, axes_tree, mesh) == {
        "mu": ({"q": {"a": P(None, ALL, None), "b": P(None, TENSOR_FIRST, None)}},),
        "nu": {"q": {"a": P(None, ALL, None), "b": P(None, None, None)}},
        "q": {"a": P(), "c": P()},
        "a": P(),
        "count": P(),
    }


def test_nothing_is_moved_without_a_mesh():
    model = build_model("lora")
    before = jax.tree.leaves(nnx.state(model))
    shard_module(model)
    for a, b in zip(before, jax.tree.leaves(nnx.state(model)), strict=True):
        assert a is b
    x = {"a": jnp.ones(3)}
    state = init_sharded(lambda p: jax.tree.map(jnp.zeros_like, p), x, {"a": (None,)})
    assert state["a"].devices() == x["a"].devices()


def test_arrays_that_are_sharded_already_are_not_copied():
    model = build_model("lora")
    with use_mesh(MESHES[0]):
        shard_module(model)
        before = jax.tree.leaves(nnx.state(model))
        shard_module(model)
    for a, b in zip(before, jax.tree.leaves(nnx.state(model)), strict=True):
        assert a is b


@pytest.mark.parametrize("text", MESHES)
def test_init_sharded(text):
    mesh = build_mesh(text)
    model = build_model("lora")
    plain = factors(model)
    with jax.set_mesh(mesh):
        shard_module(model)
        state = init_sharded(
            lambda p: {
                "twice": jax.tree.map(lambda x: 2 * x, p),
                "count": jnp.ones(()),
            },
            factors(model),
            axes(model),
        )
    for path, x in leaves(state["twice"]).items():
        np.testing.assert_array_equal(x, 2 * leaves(plain)[path])
        assert x.sharding == leaves(factors(model))[path].sharding
    assert state["count"].sharding.is_fully_replicated


def test_to_host_gathers_arrays():
    mesh = build_mesh(MESHES[2])
    x = np.arange(96, dtype=np.float32).reshape(8, 12)
    sharded = [
        jax.device_put(x, NamedSharding(mesh, spec))
        for spec in (P(), P("fsdp"), P(("data", "tensor"), "fsdp"))
    ]
    for host in to_host({"arrays": sharded})["arrays"]:
        assert type(host) is np.ndarray
        np.testing.assert_array_equal(host, x)
    assert type(to_host(jnp.ones(3))) is np.ndarray


@pytest.mark.parametrize("text", MESHES)
def test_rows_of_a_sharded_batch_are_in_order(text):
    mesh, batch = build_mesh(text), random_batch()
    shard_batch = BatchSharder(mesh, ROWS)
    assert shard_batch.local_rows == list(range(ROWS))  # of a single process
    sharded = shard_batch(batch)
    groups = mesh.shape["data"] * mesh.shape["fsdp"]
    for name, x in sharded.items():
        np.testing.assert_array_equal(np.asarray(x), batch[name])
        assert x.dtype == batch[name].dtype
        for shard in x.addressable_shards:
            d, f, _ = np.argwhere(mesh.devices == shard.device)[0]
            first = (d * mesh.shape["fsdp"] + f) * (ROWS // groups)
            rows = batch[name][first : first + ROWS // groups]
            np.testing.assert_array_equal(np.asarray(shard.data), rows)


class PartlyAddressable:
    """A sharding of which only some rows are on devices of this process."""

    def __init__(self, *rows):
        self.rows = rows

    def addressable_devices_indices_map(self, shape):
        return {n: (rows,) for n, rows in enumerate(self.rows)} | {"idle": None}


def test_a_process_reads_the_rows_of_its_devices_only(monkeypatch):
    sharding = PartlyAddressable(slice(12, 16), slice(4, 8), slice(12, 16))
    module = "manifold_lora.distributed.arrays."
    monkeypatch.setattr(module + "NamedSharding", lambda *_: sharding)
    shard_batch = BatchSharder(build_mesh(MESHES[0]), ROWS)
    assert shard_batch.local_rows == [4, 5, 6, 7, 12, 13, 14, 15]
    shapes = []

    def make_array(shape, _, callback):
        shapes.append(shape)
        return [callback((index, slice(None))) for index in sharding.rows]

    monkeypatch.setattr("jax.make_array_from_callback", make_array)
    x = np.arange(ROWS * 2).reshape(ROWS, 2)
    shards = shard_batch({"ids": x[shard_batch.local_rows]})["ids"]
    assert shapes == [(ROWS, 2)]
    for index, shard in zip(sharding.rows, shards, strict=True):
        np.testing.assert_array_equal(shard, x[index])
