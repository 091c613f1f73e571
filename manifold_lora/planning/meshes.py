"""Meshes compared without compiling: an estimate of memory and time for each.

The estimate ranks meshes and says what would make an over-full plan fit; the numbers
of a plan come from the compiled program.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from manifold_lora.distributed.mesh import BATCH_AXES, divisibility_errors, group_count
from manifold_lora.models import LlamaConfig
from manifold_lora.models.shapes import parameter_count
from manifold_lora.planning.chips import Topology
from manifold_lora.training.config import TrainConfig

Sizes = dict[str, int]
# Bytes a second along axes of a mesh of these sizes.
Bandwidth = Callable[[Sizes, tuple[str, ...]], float]
# In float32, and rounded to half of it: attention weights of a layer, logits of a row.
_COPIES = 1.5


@dataclass(frozen=True)
class Job:
    """What every mesh of a search has in common."""

    run: TrainConfig
    shape: LlamaConfig
    trained: int  # numbers in the factors

    @property
    def rows(self) -> int:
        """Of a micro-batch, all devices together."""
        return self.run.batch.batch_size // self.run.batch.accumulate


@dataclass(frozen=True)
class Estimate:
    """What a step takes of one device."""

    memory: float  # bytes
    fixed: float  # of them those that do not grow with the rows of a micro-batch
    seconds: float  # 0 without a chip's numbers


def estimate(
    job: Job, sizes: Sizes, topology: Topology | None, bandwidth: Bandwidth
) -> Estimate:
    """Memory and time of a step on a mesh.

    Memory: the base over fsdp × tensor; one group's copy of the factors and of their
    gradients, and the kept parts; two layers and the embeddings gathered; each layer's
    input (without remat all that it computes); what one layer computes, and its
    gradients; attention weights and one row's logits.

    Time: the larger one of computing and gathering the base (twice a micro-batch,
    forward and backward, which overlaps), plus what nothing hides: over tensor four
    all-reduces of the activations a layer and micro-batch, and one of the factors'
    gradients over the groups.
    """
    run, shape = job.run, job.shape
    tensor, fsdp, groups = sizes["tensor"], sizes["fsdp"], group_count(sizes)
    item = 4 if run.model.dtype == "float32" else 2
    rows, time = math.ceil(job.rows / groups), run.batch.sequence_length
    base = parameter_count(shape) * item
    inside = shape.vocab_size * shape.hidden_size * item
    layer = (base - inside) / shape.num_hidden_layers
    activation = rows * time * shape.hidden_size * item

    inner = activation * (4 + _inner(shape) / tensor)  # all that a layer computes
    attention = 4 * rows * shape.num_attention_heads / tensor * time**2
    logits = 4 * time * shape.vocab_size / tensor
    fixed = (
        base / (fsdp * tensor)
        + 4 * job.trained * (2 / tensor + 3 / (fsdp * tensor))
        + (2 * layer + inside) / tensor
        + _COPIES * logits
    )
    memory = (
        fixed
        + (activation if run.model.remat else inner) * shape.num_hidden_layers
        + 2 * inner
        + _COPIES * attention
    )
    if topology is None:
        return Estimate(memory, fixed, 0.0)

    parts = run.batch.accumulate

    def moved(bytes_each: float, axes: tuple[str, ...]) -> float:
        count = math.prod(sizes[axis] for axis in axes)
        if count == 1:
            return 0.0
        return bytes_each * (count - 1) / count / bandwidth(sizes, axes)

    tokens = run.batch.batch_size * time / (groups * tensor)
    flops = (2 * 3 * parameter_count(shape)) * tokens
    gathered = moved(2 * parts * base / tensor, ("fsdp",))
    exposed = moved(8 * parts * activation * shape.num_hidden_layers, ("tensor",))
    exposed += moved(2 * 4 * job.trained / tensor, BATCH_AXES)
    seconds = max(flops / topology.chip.flops, gathered) + exposed
    return Estimate(memory, fixed, seconds)


def _inner(shape: LlamaConfig) -> float:
    """Widths of heads and MLP of a layer in all, over the model's width."""
    heads = shape.num_attention_heads + 2 * shape.num_key_value_heads
    return (heads * shape.head_dim + 3 * shape.intermediate_size) / shape.hidden_size


def candidates(job: Job, count: int) -> Iterator[Sizes]:
    """Every mesh of that many devices that divides the model and the batch."""
    for tensor in divisors(count):
        for fsdp in divisors(count // tensor):
            data = count // tensor // fsdp
            sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
            if not divisibility_errors(sizes, job.shape, job.rows):
                yield sizes


def divisors(number: int) -> list[int]:
    """All of them, the number itself included."""
    return [n for n in range(1, number + 1) if number % n == 0]


def ranked(
    job: Job, count: int, topology: Topology | None, bandwidth: Bandwidth
) -> list[Sizes]:
    """The candidates by estimate, best first: those that fit, by time, then the rest.

    Without a chip's numbers, by memory.
    """
    limit = topology.chip.memory if topology else math.inf

    def key(sizes: Sizes) -> tuple[Any, ...]:
        found = estimate(job, sizes, topology, bandwidth)
        if found.memory > limit or topology is None:
            return (found.memory > limit, found.memory, found.seconds)
        return (False, found.seconds, found.memory)

    return sorted(candidates(job, count), key=key)


def remedies(
    job: Job, sizes: Sizes, needed: float, limit: float, topology: Topology | None
) -> list[str]:
    """Single changes that should make an over-full plan fit, best first.

    The compiler's own need is taken apart as the estimate is: what is fixed, and what
    grows with the rows, which is scaled as the estimate says.
    """

    def bandwidth(sizes: Sizes, axes: tuple[str, ...]) -> float:
        return 1.0

    before = estimate(job, sizes, None, bandwidth)
    grown = max(needed - before.fixed, 0) / (before.memory - before.fixed)
    found: list[str] = []

    def offer(text: str, changed: Job, mesh: Sizes) -> bool:
        then = estimate(changed, mesh, None, bandwidth)
        after = then.fixed + grown * (then.memory - then.fixed)
        if after <= limit:
            found.append(f"{text} (about {after / 2**30:.1f} GiB)")
        return after <= limit

    if not job.run.model.remat:
        offer("leave --remat on", _with(job, "model", remat=True), sizes)
    groups, run = group_count(sizes), job.run
    for parts in divisors(run.batch.batch_size):
        rows = run.batch.batch_size // parts
        if parts <= run.batch.accumulate or rows % groups:
            continue
        text = f"--accumulate {parts}: {rows // groups} rows a device at a time"
        if offer(text, _with(job, "batch", accumulate=parts), sizes):
            break
    count = math.prod(sizes.values())
    meshes = [
        mesh for mesh in candidates(job, count) if mesh["tensor"] > sizes["tensor"]
    ]
    for mesh in sorted(meshes, key=lambda m: (m["tensor"], m["data"])):
        if offer(f"--mesh {written(mesh)}", job, mesh):
            break
    for batch in reversed(divisors(run.batch.batch_size)[:-1]):
        if batch % (groups * run.batch.accumulate):
            continue
        if offer(f"--batch-size {batch}", _with(job, "batch", batch_size=batch), sizes):
            break
    if topology is not None:
        for side in topology.chip.slices:
            larger = dataclasses.replace(
                topology, shape=tuple(int(n) for n in side.split("x"))
            )
            if larger.count <= topology.count:
                continue
            if mesh := next(iter(ranked(job, larger.count, None, bandwidth)), None):
                if offer(f"--topology {larger} --mesh {written(mesh)}", job, mesh):
                    break
    return found


def _with(job: Job, part: str, **changes: Any) -> Job:
    """The job with other settings in a part of its run."""
    changed = dataclasses.replace(getattr(job.run, part), **changes)
    return dataclasses.replace(job, run=dataclasses.replace(job.run, **{part: changed}))


def written(sizes: Sizes) -> str:
    """The sizes as --mesh takes them, without axes of size 1.

    >>> written({"data": 1, "fsdp": 4, "tensor": 2})
    'fsdp=4,tensor=2'
    """
    named = [f"{axis}={size}" for axis, size in sizes.items() if size > 1]
    return ",".join(named) or "fsdp=1"
