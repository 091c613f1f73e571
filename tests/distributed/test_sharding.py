"""Where arrays are on the mesh: a table by hand, and laws that hold for all."""

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
from manifold_lora.distributed.arrays import Feed, initialised, place, to_host
from manifold_lora.distributed.sharding import follow, kept, names, used
from manifold_lora.methods import METHODS
from tests.distributed.cases import MESHES, ROWS, Run, batch_of, mesh_of, model_of, on

pytestmark = pytest.mark.mesh

ALL = ("fsdp", "tensor")
TURNED = ("tensor", "fsdp")
GROUPS = ("data", "fsdp")
# Names of axes and shape, and how the array is kept on each of MESHES.
TABLE = {
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
    "embedding of 61 words": (
        ("vocab", "embed"),
        (61, 32),
        [P(None, "fsdp"), P(None, "fsdp"), P(None, "fsdp")],
    ),
    "embedding of 64 words": (
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
        [P(None, "fsdp", None), P(None, "fsdp", None), P(None, TURNED, None)],
    ),
    "factor on mlp, two columns more": (
        ("layers", "mlp", "rank"),
        (8, 34, 8),
        [P(None, None, None), P(None, "fsdp", None), P(None, "tensor", None)],
    ),
    "factor of 33 rows": (("layers", "mlp", "rank"), (8, 33, 8), [P(*[None] * 3)] * 3),
    "S": (("layers", "rank", "rank"), (8, 8, 8), [P(None, None, None)] * 3),
    "batch": (("batch", None), (16, 6), [P("fsdp", None), *[P(GROUPS, None)] * 2]),
    "batch of 2 rows": (
        ("batch", None),
        (2, 6),
        [P(None, None), P(None, None), P("data", None)],
    ),
}
# What a layer computes with: nothing is divided over fsdp but the batch.
USED = {
    "kernel of q_proj": [P(None, None, None)] * 2 + [P(None, None, "tensor")],
    "kernel of down_proj": [P(None, None, None)] * 2 + [P(None, "tensor", None)],
    "embedding of 61 words": [P(None, None)] * 3,
    "embedding of 64 words": [P(None, None)] * 2 + [P("tensor", None)],
    "factor on embed": [P(None, None, None)] * 3,
    "factor on heads": [P(None, None, None)] * 2 + [P(None, "tensor", None)],
    "batch": [P("fsdp", None)] + [P(GROUPS, None)] * 2,
}


@pytest.mark.parametrize("case", TABLE)
def test_how_arrays_are_kept(case):
    named, shape, expected = TABLE[case]
    assert [kept(named, shape, mesh_of(text)) for text in MESHES] == expected


@pytest.mark.parametrize("case", USED)
def test_how_arrays_are_used(case):
    named, shape, _ = TABLE[case]
    assert [used(named, shape, mesh_of(text)) for text in MESHES] == USED[case]


def parts(spec, mesh):
    """The number of parts of each axis, and all axes of the mesh that are taken."""
    taken = [(a,) if isinstance(a, str) else a or () for a in spec]
    return [math.prod(mesh.shape[a] for a in axis) for axis in taken], sum(taken, ())


@pytest.mark.parametrize("text", MESHES)
@pytest.mark.parametrize("method", METHODS)
def test_every_variable_of_a_model(method, text):
    mesh, model = mesh_of(text), model_of(method)
    weights = mesh.shape["fsdp"] * mesh.shape["tensor"]
    before = {
        path: np.asarray(variable.get_value())
        for path, variable in nnx.to_flat_state(nnx.state(model))
    }
    with jax.set_mesh(mesh):
        place(model)
    seen = set()
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        x, named = variable.get_value(), names(variable)
        spec = kept(named, x.shape, mesh)
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, spec), x.ndim), path
        np.testing.assert_array_equal(np.asarray(x), before[path])
        counts, taken = parts(spec, mesh)
        assert len(set(taken)) == len(taken), path
        assert not {"data"} & {*taken}, path
        share = x.nbytes // x.addressable_shards[0].data.nbytes
        assert share == math.prod(counts)
        kernel = path[-1] == "kernel" and path[-2] != "lm_head"
        if kernel or (named.count("rank") == 1 and isinstance(variable, nnx.LoRAParam)):
            seen.add(path[-1])
            assert share == weights, path
        if "rank" in named or "layers" in named:
            assert counts[0] == 1, path
    assert "kernel" in seen and len(seen) >= 3


def leaves(tree):
    """The leaves by path, and the name of the factor that a path ends with."""
    flat = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in flat}


@pytest.mark.parametrize("text", MESHES)
@pytest.mark.parametrize("method", METHODS)
def test_moments_are_where_their_factors_are(method, text):
    model = model_of(method)
    with on(text):
        state = Run(model).state
    placed, moments = leaves(state.factors), 0
    for path, x in leaves(state.opt_state).items():
        (factor,) = [f for end, f in placed.items() if path.endswith(end)] or [None]
        if factor is None:
            assert x.shape == () and x.sharding.is_fully_replicated, path
            continue
        moments += 1
        # Where the shape is the factor's, so is the place; one column has its rows.
        same = [n if n == m else 1 for n, m in zip(factor.shape, x.shape, strict=True)]
        assert tuple(same) == x.shape
        part = factor.sharding.shard_shape(factor.shape)
        needed = [
            p if n == m else m
            for p, n, m in zip(part, factor.shape, x.shape, strict=True)
        ]
        assert list(x.sharding.shard_shape(x.shape)) == needed, path
        rows = factor.sharding.devices_indices_map(factor.shape)
        for device, index in x.sharding.devices_indices_map(x.shape).items():
            assert index[1] == rows[device][1], path
    assert moments == 2 * len(placed)


def test_two_rates_hold_the_moments_of_their_own_factors():
    model = model_of("stiefel")
    with on(MESHES[2]):
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


def test_second_moments_of_rows():
    model = model_of("loram_fr")
    with on(MESHES[2]):
        state = Run(model).state
    opt_state: Any = state.opt_state
    adam = opt_state[1][0].inner_states["constrained"].inner_state
    q_proj = adam.nu["layers"]["self_attn"]["q_proj"]
    assert q_proj["u"].shape == (3, 32, 1)
    assert q_proj["u"].sharding.spec == P(None, ("tensor", "fsdp"), None)
    assert q_proj["s"].shape == (3, 1, 1)
    assert q_proj["s"].sharding.is_fully_replicated


def test_follow_goes_by_the_end_of_the_path():
    mesh = mesh_of(MESHES[2])
    shape = jax.ShapeDtypeStruct((3, 32, 4), jnp.float32)
    params = {"q": {"a": shape, "b": shape}}
    named = {"q": {"a": ("layers", "embed", "rank"), "b": ("layers", "heads", "rank")}}
    flat = jax.ShapeDtypeStruct((96,), jnp.float32)
    column = jax.ShapeDtypeStruct((3, 32, 1), jnp.float32)
    row = jax.ShapeDtypeStruct((3, 1, 4), jnp.float32)
    tree = {
        "mu": (params,),
        "nu": {"q": {"a": column, "b": row}},
        "q": {"a": flat, "c": shape},  # of another number of axes; of no parameter
        "a": shape,
        "count": jax.ShapeDtypeStruct((), jnp.int32),
    }
    assert follow(tree, params, named, mesh) == {
        "mu": ({"q": {"a": P(None, ALL, None), "b": P(None, TURNED, None)}},),
        "nu": {"q": {"a": P(None, ALL, None), "b": P(None, None, None)}},
        "q": {"a": P(), "c": P()},
        "a": P(),
        "count": P(),
    }


def test_without_a_mesh_nothing_moves():
    model = model_of("lora")
    before = jax.tree.leaves(nnx.state(model))
    place(model)
    for a, b in zip(before, jax.tree.leaves(nnx.state(model)), strict=True):
        assert a is b
    x = {"a": jnp.ones(3)}
    got = initialised(lambda p: jax.tree.map(jnp.zeros_like, p), x, {"a": (None,)})
    assert got["a"].devices() == x["a"].devices()


def test_what_is_in_place_is_not_copied():
    model = model_of("lora")
    with on(MESHES[0]):
        place(model)
        before = jax.tree.leaves(nnx.state(model))
        place(model)
    for a, b in zip(before, jax.tree.leaves(nnx.state(model)), strict=True):
        assert a is b


@pytest.mark.parametrize("text", MESHES)
def test_a_state_begins_where_it_is_kept(text):
    mesh = mesh_of(text)
    model = model_of("lora")
    plain = factors(model)
    with jax.set_mesh(mesh):
        place(model)
        made = initialised(
            lambda p: {
                "twice": jax.tree.map(lambda x: 2 * x, p),
                "count": jnp.ones(()),
            },
            factors(model),
            axes(model),
        )
    for path, x in leaves(made["twice"]).items():
        np.testing.assert_array_equal(x, 2 * leaves(plain)[path])
        assert x.sharding == leaves(factors(model))[path].sharding
    assert made["count"].sharding.is_fully_replicated


def test_to_host_gives_whole_arrays():
    mesh = mesh_of(MESHES[2])
    x = np.arange(96, dtype=np.float32).reshape(8, 12)
    placed = [
        jax.device_put(x, NamedSharding(mesh, spec))
        for spec in (P(), P("fsdp"), P(("data", "tensor"), "fsdp"))
    ]
    for got in to_host({"some": placed})["some"]:
        assert type(got) is np.ndarray
        np.testing.assert_array_equal(got, x)
    assert type(to_host(jnp.ones(3))) is np.ndarray


@pytest.mark.parametrize("text", MESHES)
def test_a_fed_batch_has_its_rows_in_order(text):
    mesh, batch = mesh_of(text), batch_of()
    feed = Feed(mesh, ROWS)
    assert feed.rows == list(range(ROWS))  # one process needs all
    fed = feed(batch)
    groups = mesh.shape["data"] * mesh.shape["fsdp"]
    for name, x in fed.items():
        np.testing.assert_array_equal(np.asarray(x), batch[name])
        assert x.dtype == batch[name].dtype
        for shard in x.addressable_shards:
            d, f, _ = np.argwhere(mesh.devices == shard.device)[0]
            first = (d * mesh.shape["fsdp"] + f) * (ROWS // groups)
            own = batch[name][first : first + ROWS // groups]
            np.testing.assert_array_equal(np.asarray(shard.data), own)


class OneOfTwo:
    """A sharding of which this process has the devices of some rows."""

    def __init__(self, *rows):
        self.rows = rows

    def addressable_devices_indices_map(self, shape):
        return {n: (rows,) for n, rows in enumerate(self.rows)} | {"idle": None}


def test_a_process_reads_the_rows_of_its_devices_only(monkeypatch):
    own = OneOfTwo(slice(12, 16), slice(4, 8), slice(12, 16))
    module = "manifold_lora.distributed.arrays."
    monkeypatch.setattr(module + "NamedSharding", lambda *_: own)
    feed = Feed(mesh_of(MESHES[0]), ROWS)
    assert feed.rows == [4, 5, 6, 7, 12, 13, 14, 15]
    asked = []

    def make(shape, sharding, rows):
        asked.append(shape)
        return [rows((index, slice(None))) for index in own.rows]

    monkeypatch.setattr("jax.make_array_from_callback", make)
    x = np.arange(ROWS * 2).reshape(ROWS, 2)
    parts = feed({"ids": x[feed.rows]})["ids"]
    assert asked == [(ROWS, 2)]
    for index, part in zip(own.rows, parts, strict=True):
        np.testing.assert_array_equal(part, x[index])
