"""Estimates of memory and time for meshes, without compiling.

Estimates rank meshes and suggest changes to a plan that does not fit. The numbers of a
plan itself come from the compiled program.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from manifold_lora.distributed.mesh import BATCH_AXES, divisibility_errors, group_count
from manifold_lora.models import LlamaConfig
from manifold_lora.models.quantised import BLOCK
from manifold_lora.models.remat import Remat
from manifold_lora.models.shapes import parameter_count
from manifold_lora.planning.chips import Topology
from manifold_lora.training.config import TrainConfig

Sizes = dict[str, int]
# Bytes/s along axes of a mesh of these sizes.
Bandwidth = Callable[[Sizes, tuple[str, ...]], float]
# The logits of a row exist in float32 and in bfloat16.
_COPIES = 1.5


@dataclass(frozen=True)
class Workload:
    """The training step for which meshes are compared."""

    run: TrainConfig
    shape: LlamaConfig
    trained: int  # parameters of the factors

    @property
    def rows(self) -> int:
        """Rows of a micro-batch, over all devices."""
        return self.run.batch.batch_size // self.run.batch.accumulate

    def with_remat(self, remat: Remat) -> "Workload":
        """The same with another rematerialisation policy."""
        return _with(self, "model", remat=remat)


@dataclass(frozen=True)
class Estimate:
    """The cost of a step on one device."""

    memory: float  # bytes
    fixed: float  # bytes of these that do not depend on the rows of a micro-batch
    seconds: float  # 0 for CPU devices


def estimate(
    workload: Workload, sizes: Sizes, topology: Topology | None, bandwidth: Bandwidth
) -> Estimate:
    """Estimated memory and time of a step on a mesh.

    Memory: the base sharded over fsdp × tensor; the factors and their gradients
    gathered for compute, and the stored shards of factors and optimiser state; two
    gathered layers and the embeddings; what each layer keeps, by --remat; the
    activations and gradients of one layer; the logits of one row.

    Time: the maximum of computation and all-gathers of the base (two per micro-batch,
    forward and backward, which overlap with it), plus exposed communication: over
    tensor, four all-reduces of activations per layer and micro-batch, and one
    all-reduce of the factors' gradients over the groups.
    """
    run, shape = workload.run, workload.shape
    tensor, fsdp, groups = sizes["tensor"], sizes["fsdp"], group_count(sizes)
    item = 4 if run.model.dtype == "float32" else 2
    rows, time = math.ceil(workload.rows / groups), run.batch.sequence_length
    embedding = shape.vocab_size * shape.hidden_size * item
    base = _base_bytes(run.model.base_dtype, shape, item)
    layer = (base - embedding) / shape.num_hidden_layers
    activation = rows * time * shape.hidden_size * item

    inner = activation * (4 + _inner_width(shape) / tensor)  # activations of a layer
    # Of "auto", what it keeps where there is little memory.
    less = {"block": activation, "auto": activation, "offload": 0.0}
    kept = less.get(run.model.remat, inner)
    logits = 4 * time * shape.vocab_size / tensor
    fixed = (
        base / (fsdp * tensor)
        + 4 * workload.trained * (2 / tensor + 3 / (fsdp * tensor))
        + (2 * layer + embedding) / tensor
        + _COPIES * logits
    )
    memory = fixed + kept * shape.num_hidden_layers + 2 * inner
    if topology is None:
        return Estimate(memory, fixed, 0.0)

    micro_batches = run.batch.accumulate

    def transfer(bytes_each: float, axes: tuple[str, ...]) -> float:
        count = math.prod(sizes[axis] for axis in axes)
        if count == 1:
            return 0.0
        return bytes_each * (count - 1) / count / bandwidth(sizes, axes)

    tokens = run.batch.batch_size * time / (groups * tensor)
    flops = (2 * 3 * parameter_count(shape)) * tokens
    gather = transfer(2 * micro_batches * base / tensor, ("fsdp",))
    activations = 8 * micro_batches * activation * shape.num_hidden_layers
    exposed = transfer(activations, ("tensor",))
    exposed += transfer(2 * 4 * workload.trained / tensor, BATCH_AXES)
    seconds = max(flops / topology.chip.flops, gather) + exposed
    return Estimate(memory, fixed, seconds)


def _base_bytes(base_dtype: str | None, shape: LlamaConfig, item: int) -> float:
    """Bytes of the base; see `models.quantised.quantise`."""
    parameters = parameter_count(shape)
    if base_dtype is None:
        return parameters * item
    table = shape.vocab_size * shape.hidden_size
    scale = 16 / BLOCK  # bits of each number
    bits = {"int8": 8, "nf4": 4}[base_dtype] + scale
    if shape.tie_word_embeddings:
        return table * item + (parameters - table) * bits / 8
    embeddings = table * (item + (8 + scale) / 8)
    return embeddings + (parameters - 2 * table) * bits / 8


def block_of(run: TrainConfig) -> int:
    """The inputs of a projection that must stay on one device."""
    return 1 if run.model.base_dtype is None else BLOCK


def _inner_width(shape: LlamaConfig) -> float:
    """Total width of the heads and the MLP of a layer, relative to the hidden size."""
    heads = shape.num_attention_heads + 2 * shape.num_key_value_heads
    return (heads * shape.head_dim + 3 * shape.intermediate_size) / shape.hidden_size


def candidates(workload: Workload, count: int) -> Iterator[Sizes]:
    """All meshes of `count` devices that divide the model and the batch."""
    for tensor in divisors(count):
        for fsdp in divisors(count // tensor):
            data = count // tensor // fsdp
            sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
            block = block_of(workload.run)
            if not divisibility_errors(sizes, workload.shape, workload.rows, block):
                yield sizes


def divisors(number: int) -> list[int]:
    """All divisors, including the number itself."""
    return [n for n in range(1, number + 1) if number % n == 0]


def rank_meshes(
    workload: Workload, count: int, topology: Topology | None, bandwidth: Bandwidth
) -> list[Sizes]:
    """The candidates, best first: those that fit by time, then the others by memory.

    CPU devices have no limit and no estimate of time: all are ranked by memory.
    """
    limit = topology.chip.memory if topology else math.inf

    def key(sizes: Sizes) -> tuple[Any, ...]:
        cost = estimate(workload, sizes, topology, bandwidth)
        if cost.memory > limit or topology is None:
            return (cost.memory > limit, cost.memory, cost.seconds)
        return (False, cost.seconds, cost.memory)

    return sorted(candidates(workload, count), key=key)


def remedies(
    workload: Workload,
    sizes: Sizes,
    needed: float,
    limit: float,
    topology: Topology | None,
) -> list[str]:
    """Single changes with which the step should fit, best first.

    The memory that the compiler needs is split as in the estimate: the fixed part is
    taken from there, and the rest is scaled in proportion to the estimate's.

    Args:
        workload: the step.
        sizes: of the mesh.
        needed: bytes per device, from the compiler.
        limit: bytes available per device.
        topology: the TPU slice, or None for CPU devices.
    """

    def bandwidth(sizes: Sizes, axes: tuple[str, ...]) -> float:
        return 1.0

    before = estimate(workload, sizes, None, bandwidth)
    ratio = max(needed - before.fixed, 0) / (before.memory - before.fixed)
    changes: list[str] = []

    def offer(text: str, changed: Workload, mesh: Sizes) -> bool:
        after = estimate(changed, mesh, None, bandwidth)
        memory = after.fixed + ratio * (after.memory - after.fixed)
        if memory <= limit:
            changes.append(f"{text} (about {memory / 2**30:.1f} GiB)")
        return memory <= limit

    if workload.run.model.remat in ("none", "dots"):
        offer("--remat block", workload.with_remat("block"), sizes)
    groups, run = group_count(sizes), workload.run
    for count in divisors(run.batch.batch_size):
        rows = run.batch.batch_size // count
        if count <= run.batch.accumulate or rows % groups:
            continue
        text = (
            f"--accumulate {count}: micro-batches of {rows // groups} rows per device"
        )
        if offer(text, _with(workload, "batch", accumulate=count), sizes):
            break
    devices = math.prod(sizes.values())
    meshes = [
        mesh
        for mesh in candidates(workload, devices)
        if mesh["tensor"] > sizes["tensor"]
    ]
    for mesh in sorted(meshes, key=lambda m: (m["tensor"], m["data"])):
        if offer(f"--mesh {format_mesh(mesh)}", workload, mesh):
            break
    for batch in reversed(divisors(run.batch.batch_size)[:-1]):
        if batch % (groups * run.batch.accumulate):
            continue
        if offer(
            f"--batch-size {batch}", _with(workload, "batch", batch_size=batch), sizes
        ):
            break
    if topology is not None:
        for shape in topology.chip.slices:
            larger = dataclasses.replace(
                topology, shape=tuple(int(n) for n in shape.split("x"))
            )
            if larger.count <= topology.count:
                continue
            if mesh := next(
                iter(rank_meshes(workload, larger.count, None, bandwidth)), None
            ):
                if offer(
                    f"--topology {larger} --mesh {format_mesh(mesh)}", workload, mesh
                ):
                    break
    return changes


def _with(workload: Workload, part: str, **changes: Any) -> Workload:
    """The workload with other settings in a part of its run."""
    changed = dataclasses.replace(getattr(workload.run, part), **changes)
    return dataclasses.replace(
        workload, run=dataclasses.replace(workload.run, **{part: changed})
    )


def format_mesh(sizes: Sizes) -> str:
    """The sizes in the format of --mesh, without axes of size 1.

    >>> format_mesh({"data": 1, "fsdp": 4, "tensor": 2})
    'fsdp=4,tensor=2'
    """
    named = [f"{axis}={size}" for axis, size in sizes.items() if size > 1]
    return ",".join(named) or "fsdp=1"
