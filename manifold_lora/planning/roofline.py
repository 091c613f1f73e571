"""A roofline model of the time of a step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from manifold_lora.planning.chips import Topology
from manifold_lora.planning.program import Program
from manifold_lora.planning.targets import bandwidth


@dataclass(frozen=True)
class Times:
    """Seconds per step on each device, at peak rates.

    Computation, memory traffic and asynchronous collectives overlap, so that the
    slowest of them counts; synchronous collectives add to it. This is a lower bound: a
    real step does not run at peak rates.
    """

    compute: float  # FLOPs over the bfloat16 peak
    memory: float  # HBM bytes over the memory bandwidth
    hidden: float  # collectives overlapped with computation
    exposed: float  # collectives that the program waits for

    @property
    def step(self) -> float:
        """The maximum of the overlapping times, plus exposed communication."""
        return max(self.compute, self.memory, self.hidden) + self.exposed


def times(passes: float, program: Program, devices: Any, topology: Topology) -> Times:
    """The times of a program.

    Args:
        passes: FLOPs per device, with float32 products counted as bfloat16 passes.
        program: its communication and memory traffic.
        devices: of the mesh, in its shape.
        topology: the slice of the devices.
    """
    chip = topology.chip
    by_hidden = {True: 0.0, False: 0.0}
    for collective in program.collectives:
        by_hidden[collective.hidden] += transfer_seconds(
            collective.bytes, collective.axes, devices, topology
        )
    return Times(
        passes / chip.flops,
        program.hbm_bytes / chip.memory_bandwidth,
        by_hidden[True],
        by_hidden[False],
    )


def transfer_seconds(
    received: float, axes: Sequence[str], devices: Any, topology: Topology
) -> float:
    """Seconds for every device to receive bytes along axes of the mesh."""
    return received / bandwidth(devices, axes, topology)
