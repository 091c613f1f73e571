"""TPU slices by name, and the bandwidth between their chips."""

import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from manifold_lora.errors import InputError
from manifold_lora.planning.chips import CHIPS, read_topology
from manifold_lora.planning.targets import bandwidth, cpu_devices, topology_devices


def test_slices_by_name():
    slice_ = read_topology("v5p:4x8x8")
    assert (slice_.generation, slice_.shape, slice_.count) == ("v5p", (4, 8, 8), 256)
    assert str(slice_) == "v5p:4x8x8" and slice_.chip is CHIPS["v5p"]
    assert slice_.wraps == (True, True, True)
    assert read_topology("v5p:2x4x4").wraps == (False, False, False)
    assert read_topology("v5e:8x16").wraps == (False, True)
    for generation, chip in CHIPS.items():
        for sizes in chip.slices:
            assert read_topology(f"{generation}:{sizes}").count > 1


@pytest.mark.parametrize(
    "text, message",
    [
        ("v5:2x2", "unknown generation 'v5'. Did you mean v5p"),
        ("v5p:4x4", "needs 3 sizes, got '4x4'.*v5p:4x4x4"),
        ("v5e", "needs 2 sizes, got ''.*Known: v5e:2x2"),
        ("v5e:0x2", "got '0x2'"),
    ],
)
def test_invalid_slices(text, message):
    with pytest.raises(InputError, match=message):
        read_topology(text)


def test_a_slice_needs_libtpu(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'manifold-lora\[tpu\]'"):
        topology_devices(read_topology("v5e:2x2"))


# In a new process: the variables for libtpu must be set before it is loaded.
_DEVICES = """
from manifold_lora.planning.chips import read_topology, hide_accelerators
hide_accelerators()
from manifold_lora.planning.targets import topology_devices
for name in {names}:
    try:
        found = topology_devices(read_topology(name))
        print(len(found), len({{d.id for d in found}}))
    except Exception as error:
        print(type(error).__name__, error)
"""


def test_libtpu_supports_every_slice_and_logs_nothing():
    pytest.importorskip("libtpu", reason="needs libtpu (the [tpu] extra)")
    names = [f"{name}:{sizes}" for name in CHIPS for sizes in CHIPS[name].slices]
    process = subprocess.run(
        [sys.executable, "-c", _DEVICES.format(names=[*names, "v5e:1x1", "v5e:3x3"])],
        env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"},
        capture_output=True,
        text=True,
        check=True,
    )
    *found, one, none = process.stdout.splitlines()
    counts = [read_topology(name).count for name in names]
    assert found == [f"{count} {count}" for count in counts]
    assert one == "1 1"
    assert none.startswith("InputError --topology v5e:3x3: no such slice (Topology")
    assert process.stderr == ""


def test_cpu_devices():
    jax.devices()  # other tests need all of them
    assert len(cpu_devices(4)) == 4
    with pytest.raises(
        InputError, match="--devices 9: JAX is already initialised with 8"
    ):
        cpu_devices(9)


def placed(topology, *shape):
    """The devices of a mesh of this shape, in the order of their coordinates."""
    chips = np.empty(topology.count, object)
    padded = (*topology.shape, 1)[:3]
    for number, place in enumerate(np.ndindex(*padded)):
        chips[number] = SimpleNamespace(coords=place)
    return chips.reshape(shape)


def test_bandwidth_along_axes():
    cube = read_topology("v5p:4x4x4")
    link = cube.chip.link
    mesh = placed(cube, 4, 4, 4)
    assert bandwidth(mesh, ["tensor"], cube) == 2 * link  # once around
    assert bandwidth(mesh, ["fsdp", "tensor"], cube) == 4 * link
    assert bandwidth(mesh, ["data", "fsdp", "tensor"], cube) == 6 * link
    assert bandwidth(mesh, [], cube) == 0
    half = placed(cube, 8, 4, 2)
    assert bandwidth(half, ["tensor"], cube) == link  # half a side: a line
    # A ring of every second chip of a dimension, which shares its links with another
    # ring, and a line of two along the same dimension.
    assert bandwidth(placed(cube, 16, 2, 2), ["fsdp"], cube) == 2 / 2 * link
    flat = read_topology("v5e:4x4")  # no pod's whole side, so no ring
    assert bandwidth(placed(flat, 1, 4, 4), ["tensor"], flat) == flat.chip.link
    assert bandwidth(placed(flat, 1, 16, 1), ["fsdp"], flat) == 2 * flat.chip.link
