"""The devices that a plan compiles for: of a TPU slice without access to it, or CPU."""

import importlib.util
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from manifold_lora.distributed.mesh import AXES
from manifold_lora.errors import InputError
from manifold_lora.planning.chips import Topology, unknown_slice

# Options of libtpu for a generation, beside the name of the slice.
_OPTIONS: dict[str, dict[str, Any]] = {"v4": {"chip_config_name": "megacore"}}


def topology_devices(topology: Topology) -> list[Any]:
    """One device per chip of the slice; requires libtpu, but no TPU.

    Raises:
        InputError: libtpu is not installed, or does not support the slice.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            f"--topology {topology} requires libtpu, which is not installed: pip "
            "install 'manifold-lora[tpu]', or plan for CPU devices with --devices."
        )
    options = dict(_OPTIONS.get(topology.generation, {}))
    if topology.count == 1:  # one chip of a host with several
        options["chips_per_host_bounds"] = [1, 1, 1]
    try:
        description = topologies.get_topology_desc(
            platform="tpu", topology_name=str(topology), **options
        )
    except jax.errors.JaxRuntimeError as error:
        if "INVALID_ARGUMENT" not in str(error):
            raise
        reason = str(error).partition("INVALID_ARGUMENT: ")[2].splitlines()[0]
        raise unknown_slice(str(topology), reason) from error
    return list(description.devices)


def cpu_devices(count: int) -> list[Any]:
    """This many CPU devices, simulated on this machine.

    Raises:
        InputError: JAX is already initialised with fewer devices.
    """
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        pass  # already initialised
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise InputError(
            f"--devices {count}: JAX is already initialised with {len(devices)} CPU "
            "devices. Plan in a new process, as the command does."
        )
    return devices[:count]


def bandwidth(devices: np.ndarray, axes: Sequence[str], topology: Topology) -> float:
    """Bytes/s that a chip receives from the others along axes of the mesh.

    Each physical dimension that a group spans contributes two links if the group is a
    ring around the whole dimension, or one if it is a line, divided by the number of
    groups that interleave and share them. The slowest group counts.

    Args:
        devices: of the mesh, in its shape.
        axes: of the mesh.
        topology: the slice of the devices.
    """
    indices = [AXES.index(axis) for axis in axes]
    members = int(np.prod([devices.shape[index] for index in indices]))
    coordinates = np.array([device.coords for device in devices.flat])
    coordinates = coordinates.reshape(*devices.shape, -1)
    groups = np.moveaxis(coordinates, indices, range(len(indices)))
    groups = groups.reshape(members, -1, coordinates.shape[-1]).swapaxes(0, 1)
    return min(_group_bandwidth(group, topology) for group in groups)


def _group_bandwidth(group: np.ndarray, topology: Topology) -> float:
    links = 0.0
    for dimension, size in enumerate(topology.shape):
        positions = np.unique(group[:, dimension])
        if len(positions) == 1:
            continue
        stride = int(np.diff(positions).min())
        is_ring = topology.wraps[dimension] and len(positions) * stride == size
        links += (2 if is_ring else 1) / stride
    return links * topology.chip.link
