"""How long a step takes at the peaks of a chip."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from manifold_lora.planning.chips import Topology
from manifold_lora.planning.program import Program
from manifold_lora.planning.targets import bandwidth


@dataclass(frozen=True)
class Times:
    """Seconds of one step on each device, at peak rates.

    Computing, memory traffic and the collectives that the compiler starts early run at
    once, so that the longest of them counts. Collectives that the program waits for
    are added. A real step takes longer: no program is at a peak all the time.
    """

    compute: float  # floating-point operations over the peak of bfloat16
    memory: float  # bytes of HBM over its bandwidth
    hidden: float  # collectives that run beside the computation
    exposed: float  # those that it waits for

    @property
    def step(self) -> float:
        """The longest of what runs at once, and then what waits."""
        return max(self.compute, self.memory, self.hidden) + self.exposed


def times(passes: float, program: Program, devices: Any, topology: Topology) -> Times:
    """The times of a program.

    Args:
        passes: floating-point operations of one device, a float32 product as often as
            a TPU makes it in bfloat16.
        program: what it moves.
        devices: of the mesh, as they lie in it.
        topology: that they are of.
    """
    chip = topology.chip
    waits = {True: 0.0, False: 0.0}
    for collective in program.collectives:
        waits[collective.hidden] += seconds(
            collective.bytes, collective.axes, devices, topology
        )
    return Times(
        passes / chip.flops,
        program.hbm_bytes / chip.memory_bandwidth,
        waits[True],
        waits[False],
    )


def seconds(
    received: float, axes: Sequence[str], devices: Any, topology: Topology
) -> float:
    """Of bytes that every device receives along axes of the mesh."""
    return received / bandwidth(devices, axes, topology)
