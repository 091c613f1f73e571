"""The devices that a plan compiles for: of a TPU slice that is not here, or CPU's."""

import importlib.util
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from manifold_lora.distributed.mesh import AXES
from manifold_lora.errors import InputError
from manifold_lora.planning.chips import Topology, unknown_slice

# What libtpu must be told of a slice beside its name.
_OPTIONS: dict[str, dict[str, Any]] = {"v4": {"chip_config_name": "megacore"}}


def topology_devices(topology: Topology) -> list[Any]:
    """One device for each chip of the slice; needs libtpu, but no TPU.

    Raises:
        InputError: libtpu is not installed, or knows no such slice.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            f"--topology {topology} is compiled by libtpu, which is not installed: "
            "pip install 'manifold-lora[tpu]', or plan for CPU devices with --devices."
        )
    options = dict(_OPTIONS.get(topology.generation, {}))
    if topology.count == 1:  # one chip of a host that has more
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
    """That many CPU devices, which are all this machine.

    Raises:
        InputError: JAX runs already, with fewer of them.
    """
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        pass  # it runs already
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise InputError(
            f"--devices {count}: JAX runs already with {len(devices)} CPU devices. "
            "Plan in a process of its own, by the command."
        )
    return devices[:count]


def bandwidth(devices: np.ndarray, axes: Sequence[str], topology: Topology) -> float:
    """Bytes a second that a chip receives from those along axes of the mesh.

    In each direction of the slice in which the chips of a group differ: the links of
    a ring, two, if they go once around it, or one of a line; shared among the groups
    that lie between each other's chips. Of all groups the slowest counts.

    Args:
        devices: of the mesh, as they lie in it.
        axes: of the mesh.
        topology: that they are of.
    """
    taken = [AXES.index(axis) for axis in axes]
    members = int(np.prod([devices.shape[axis] for axis in taken]))
    places = np.array([device.coords for device in devices.flat])
    places = places.reshape(*devices.shape, -1)
    groups = np.moveaxis(places, taken, range(len(taken)))
    groups = groups.reshape(members, -1, places.shape[-1]).swapaxes(0, 1)
    return min(_speed(group, topology) for group in groups)


def _speed(group: np.ndarray, topology: Topology) -> float:
    links = 0.0
    for side, size in enumerate(topology.shape):
        there = np.unique(group[:, side])
        if len(there) == 1:
            continue
        gap = int(np.diff(there).min())
        around = topology.wraps[side] and len(there) * gap == size
        links += (2 if around else 1) / gap
    return links * topology.chip.link
