"""Communication and memory traffic of programs whose collectives are known."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from manifold_lora.planning.flops import matmul_flops
from manifold_lora.planning.hlo import groups_of, read_module
from manifold_lora.planning.program import Collective, read_program

SIZES = {"data": 2, "fsdp": 2, "tensor": 2}
MESH = jax.make_mesh(tuple(SIZES.values()), tuple(SIZES), (AxisType.Auto,) * 3)
ROWS, COLUMNS = 16, 32
V = ROWS * COLUMNS * 4  # bytes that one device holds
AXES = [c for n in (1, 2, 3) for c in itertools.combinations(SIZES, n)]


def neighbours(x, axes):
    return lax.ppermute(x, axes[0], [(0, 1), (1, 0)])


# By kind: the program of one device, and the bytes that it receives among n devices.
KINDS = {
    "all-reduce": (lambda x, axes: lax.psum(x, axes), lambda n: 2 * (n - 1) / n * V),
    "all-gather": (
        lambda x, axes: lax.all_gather(x, axes, tiled=True),
        lambda n: (n - 1) * V,
    ),
    "reduce-scatter": (
        lambda x, axes: lax.psum_scatter(x, axes, tiled=True),
        lambda n: (n - 1) / n * V,
    ),
    "all-to-all": (
        lambda x, axes: lax.all_to_all(x, axes, 0, 1, tiled=True),
        lambda n: (n - 1) / n * V,
    ),
    "collective-permute": (neighbours, lambda n: V),
}


def compiled(program, mesh=MESH):
    """The HLO text of a program that every device runs on its own shard."""
    everywhere = P(tuple(SIZES))
    mapped = jax.shard_map(
        program, mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False
    )
    x = jax.ShapeDtypeStruct(
        (8 * ROWS, COLUMNS), jnp.float32, sharding=NamedSharding(mesh, everywhere)
    )
    text = jax.jit(mapped).lower(x).compile().as_text()
    assert text
    return text


def only(text):
    """The only collective of a program."""
    (found,) = read_program(text, SIZES).collectives
    return found


@pytest.mark.parametrize("axes", AXES, ids="-".join)
@pytest.mark.parametrize("kind", KINDS)
def test_bytes_and_axes_of_each_kind(kind, axes):
    program, bytes_of = KINDS[kind]
    taken = axes[:1] if kind == "collective-permute" else axes
    found = only(compiled(partial(program, axes=axes)))
    assert (found.kind, found.axes, found.calls) == (kind, taken, 1)
    assert found.bytes == bytes_of(2 ** len(taken))


@pytest.mark.parametrize("kind", ["all-reduce", "all-gather", "collective-permute"])
def test_loops_are_multiplied_by_their_trip_counts(kind):
    program, bytes_of = KINDS[kind]

    def outer(x):
        def inner(x, _):
            y = program(jnp.sin(x), ("fsdp",))
            return y[: x.shape[0]], None

        def twice(x, _):
            return lax.scan(inner, x, None, length=5)[0], None

        return lax.scan(twice, x, None, length=3)[0]

    found = only(compiled(outer))
    assert (found.kind, found.axes, found.calls) == (kind, ("fsdp",), 15)
    assert found.bytes == 15 * bytes_of(2)


def test_axes_follow_mesh_positions_not_device_ids():
    devices = MESH.devices.reshape(-1)[::-1].reshape(2, 2, 2).transpose(2, 0, 1)
    mesh = jax.sharding.Mesh(devices, MESH.axis_names)
    assert only(compiled(partial(lax.psum, axis_name="data"), mesh)).axes == ("data",)


def test_several_collectives_are_sorted_by_size():
    def program(x):
        x = lax.psum(x, "tensor") + lax.psum(jnp.sin(x), ("data", "fsdp"))
        return x + lax.all_gather(x, "fsdp").sum()

    found = read_program(compiled(program), SIZES).collectives
    first, *others = [(c.kind, c.axes, c.bytes) for c in found]
    assert first == ("all-reduce", ("data", "fsdp"), 1.5 * V)
    assert sorted(others) == [
        ("all-gather", ("fsdp",), V),
        ("all-reduce", ("tensor",), V),
    ]


def test_a_program_without_collectives_has_none():
    assert read_program(compiled(jnp.sin), SIZES).collectives == ()


@pytest.mark.parametrize(
    "text, groups",
    [
        ("replica_groups={{0,3},{1,2}}, x={{4}}", [[0, 3], [1, 2]]),
        ("replica_groups=[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        (
            "replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}",
            [[0, 1], [2, 3]],
        ),
        (
            "replica_groups=mesh['a'=4,'b'=2] {'a':(1)2,'b'}",
            [[0, 1, 4, 5], [2, 3, 6, 7]],
        ),
        ("replica_groups={}, channel_id=1", [[0, 1, 2, 3, 4, 5, 6, 7]]),
    ],
)
def test_formats_of_replica_groups(text, groups):
    assert groups_of(text, 8).tolist() == groups


# As the TPU compiler writes it: memory spaces, a collective over several fusions, a
# loop whose trip count is a constant in its condition, an in-place update.
TPU = """
HloModule jit_step, is_scheduled=true, num_partitions=8

%start (p0: bf16[4,8]) -> (bf16[4,8], bf16[8,8]) {
  %p0 = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  %g.1 = bf16[8,8]{1,0:T(8,128)(2,1)} all-gather(%p0), channel_id=1, \
replica_groups=[4,2]<=[8], dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %c.1 = (bf16[4,8]{1,0}, bf16[8,8]{1,0}) custom-call(%g.1), \
custom_call_target="AsyncCollectiveStart"
}

%middle (p0: bf16[4,8], p1: bf16[8,8], p2: f32[6,10]) -> (f32[1,10], bf16[8,8]) {
  %p0.1 = bf16[4,8]{1,0} parameter(0)
  %p1.1 = bf16[8,8]{1,0} parameter(1)
  %p2.1 = f32[6,10]{1,0:T(8,128)} parameter(2)
  %zero = s32[] constant(0)
  %s.1 = f32[1,10]{1,0} dynamic-slice(%p2.1, %zero, %zero), dynamic_slice_sizes={1,10}
  %g.2 = bf16[8,8]{1,0} all-gather(%p0.1), channel_id=1, \
replica_groups=[4,2]<=[8], dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %t.1 = (f32[1,10]{1,0}, bf16[8,8]{1,0}) tuple(%s.1, %p1.1)
}

%update (q0: f32[6,10], q1: f32[1,10]) -> f32[6,10] {
  %q0 = f32[6,10]{1,0} parameter(0)
  %q1 = f32[1,10]{1,0} parameter(1)
  %zero.1 = s32[] constant(0)
  ROOT %u.1 = f32[6,10]{1,0} dynamic-update-slice(%q0, %q1, %zero.1, %zero.1)
}

%body (b: (s32[], bf16[4,8], f32[6,10])) -> (s32[], bf16[4,8], f32[6,10]) {
  %b = (s32[], bf16[4,8]{1,0}, f32[6,10]{1,0:T(8,128)}) parameter(0)
  %w = bf16[4,8]{1,0} get-tuple-element(%b), index=1
  %x = f32[6,10]{1,0:T(8,128)} get-tuple-element(%b), index=2
  %f.1 = (bf16[4,8]{1,0}, bf16[8,8]{1,0}) fusion(%w), kind=kCustom, calls=%start
  %full = bf16[8,8]{1,0} get-tuple-element(%f.1), index=1
  %f.2 = (f32[1,10]{1,0}, bf16[8,8]{1,0}) fusion(%w, %full, %x), kind=kCustom, \
calls=%middle
  %row = f32[1,10]{1,0} get-tuple-element(%f.2), index=0
  %near = f32[1,10]{1,0:T(8,128)S(1)} copy(%row)
  %sum = f32[1,10]{1,0:T(8,128)S(1)} all-reduce(%near), channel_id=2, \
replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%add
  %f.3 = f32[6,10]{1,0:T(8,128)} fusion(%x, %sum), kind=kLoop, calls=%update
  %i = s32[]{:T(128)} get-tuple-element(%b), index=0
  ROOT %t.2 = (s32[], bf16[4,8]{1,0}, f32[6,10]{1,0}) tuple(%i, %w, %f.3)
}

%condition (b.1: (s32[], bf16[4,8], f32[6,10])) -> pred[] {
  %limit = s32[]{:T(128)} constant(6)
  %b.1 = (s32[], bf16[4,8]{1,0}, f32[6,10]{1,0:T(8,128)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%b.1), index=0
  ROOT %lt = pred[] compare(%i.1, %limit), direction=LT
}

ENTRY %main (a: (s32[], bf16[4,8], f32[6,10])) -> (s32[], bf16[4,8], f32[6,10]) {
  %a = (s32[], bf16[4,8]{1,0}, f32[6,10]{1,0:T(8,128)}) parameter(0)
  ROOT %loop = (s32[], bf16[4,8]{1,0}, f32[6,10]{1,0}) while(%a), \
condition=%condition, body=%body
}
""".replace("\\\n", "")


def test_a_program_of_the_tpu_compiler():
    found = read_program(TPU, SIZES)
    assert found.collectives == (
        Collective("all-gather", ("tensor",), True, 6 * 4 * 8 * 2, 6),
        Collective("all-reduce", ("data",), False, 6 * 10 * 4, 6),
    )
    # Per iteration: the start reads a shard and writes the gathered array; the middle
    # reads and writes a row; the copy reads it; the update writes it in place.
    assert found.hbm_bytes == 6 * (4 * 8 * 2 + 8 * 8 * 2 + 40 + 40 + 40 + 40)


def test_a_loop_of_data_dependent_length_counts_once():
    text = TPU.replace("constant(6)", "parameter(1)")
    loop = read_module(text).computations["main"]["loop"]
    assert read_module(text).trip_count(loop) == 1
    assert read_module(TPU).trip_count(loop) == 6


def test_flops_count_loops_and_recomputation():
    n, layers = 8, 5
    x, w = jnp.ones((n, n)), jnp.ones((layers, n, n))

    def forward(x, w):
        layer = jax.checkpoint(lambda x, w: (jnp.sin(x @ w), None))
        return lax.scan(layer, x, w)[0].sum()

    once = 2 * n**3 * layers
    assert matmul_flops(jax.make_jaxpr(forward)(x, w)) == once
    # Forward, again in the backward pass, and two products for the gradients.
    gradient = jax.make_jaxpr(jax.grad(forward, argnums=(0, 1)))(x, w)
    assert matmul_flops(gradient) == 4 * once
    # Without a loop, as XLA's cost analysis.
    batched = jax.jit(lambda x, w: jnp.einsum("ij,ljk->lik", x, w))
    counted = batched.lower(x, w).compile().cost_analysis()
    assert counted
    assert matmul_flops(jax.make_jaxpr(batched)(x, w)) == counted["flops"]


def test_float32_products_count_as_bfloat16_passes():
    def products(x, y):
        full = jnp.matmul(x, x, precision="highest")
        return full + x @ x + jnp.matmul(y, y, precision="highest")

    x = jnp.ones((4, 4))
    jaxpr = jax.make_jaxpr(products)(x, x.astype(jnp.bfloat16))
    assert matmul_flops(jaxpr) == 3 * 2 * 4**3
    assert matmul_flops(jaxpr, passes=True) == (6 + 1 + 1) * 2 * 4**3


def test_flops_inside_shard_map_count_all_devices():
    mapped = jax.shard_map(
        lambda x: x @ x.T, mesh=MESH, in_specs=P("data"), out_specs=P("data")
    )
    jaxpr = jax.make_jaxpr(mapped)(jnp.ones((8, 4)))
    assert matmul_flops(jaxpr) == 8 * 2 * 4 * 4 * 4  # all eight, not only two

    def either(x):
        return lax.cond(x[0, 0] > 0, lambda: x @ x, lambda: x)

    assert matmul_flops(jax.make_jaxpr(either)(jnp.ones((4, 4)))) == 2 * 4**3
