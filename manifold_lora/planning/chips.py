"""TPU generations and slices, with their specifications. Imports no JAX."""

import math
import os
import re
from dataclasses import dataclass

from manifold_lora.errors import InputError, nearest, shortened


@dataclass(frozen=True)
class Chip:
    """Specifications of one chip of a TPU generation."""

    flops: float  # peak bfloat16 FLOP/s
    memory: float  # bytes that the compiler lets a program use
    memory_bandwidth: float  # bytes/s
    link: float  # bytes/s of one link in one direction
    dimensions: int  # of the torus; two links per dimension
    price: float  # dollars per chip-hour
    slices: tuple[str, ...]  # common sizes offered


_SQUARES = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")

# Peak FLOP/s, memory bandwidth, slice shapes, and link bandwidth (of a chip, divided
# by its links): Google Cloud's pages "TPU v5e", "TPU v5p", "TPU v6e" (400, 1200 and 800
# GB/s over 4, 6 and 4 links, both directions) and "TPU v4"; links and memory bandwidth
# of v4: Jouppi et al. 2023, "TPU v4: An Optically Reconfigurable Supercomputer".
# Memory: the "available HBM" in libtpu's message for a program that is too large.
# Prices: Google Cloud's page "Cloud TPU pricing", United States, on demand, as of 2025;
# --price overrides them.
CHIPS = {
    "v4": Chip(275e12, 30.75 * 2**30, 1200e9, 50e9, 3, 3.22, _CUBES),
    "v5e": Chip(197e12, 15.75 * 2**30, 819e9, 50e9, 2, 1.20, _SQUARES),
    "v5p": Chip(459e12, 95.74 * 2**30, 2765e9, 100e9, 3, 4.20, _CUBES),
    "v6e": Chip(918e12, 31.25 * 2**30, 1638e9, 100e9, 2, 2.70, _SQUARES),
}


@dataclass(frozen=True)
class Topology:
    """A TPU slice: its generation and its number of chips per dimension."""

    generation: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.generation}:{'x'.join(map(str, self.shape))}"

    @property
    def chip(self) -> Chip:
        """The specifications of its chips."""
        return CHIPS[self.generation]

    @property
    def count(self) -> int:
        """The number of chips."""
        return math.prod(self.shape)

    @property
    def wraps(self) -> tuple[bool, ...]:
        """Whether each dimension has a wraparound link, which makes it a ring.

        In a 3-D slice all dimensions do, if it consists of complete 4×4×4 cubes; in a
        2-D slice only those of the full length of a pod, 16.
        """
        if len(self.shape) == 3:
            return (all(size % 4 == 0 for size in self.shape),) * 3
        return tuple(size == 16 for size in self.shape)


def read_topology(text: str) -> Topology:
    """Parse the name of a slice, such as "v5p:8x8x8".

    Raises:
        InputError: unknown generation, or sizes that are not those of a slice.
    """
    generation, _, sizes = text.partition(":")
    if generation not in CHIPS:
        raise InputError(
            f"--topology {shortened(text)}: unknown generation "
            f"{shortened(generation)!r}. {nearest(generation, CHIPS)} Write it as in "
            "v5p:8x8x8."
        )
    chip = CHIPS[generation]
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)" + f"{{{chip.dimensions - 1}}}", sizes):
        raise unknown_slice(
            text, f"it needs {chip.dimensions} sizes, got {shortened(sizes)!r}"
        )
    return Topology(generation, tuple(int(size) for size in sizes.split("x")))


def unknown_slice(text: str, why: str) -> InputError:
    """The error for a slice that does not exist, with the known slices."""
    generation = text.partition(":")[0]
    known = [f"{generation}:{sizes}" for sizes in CHIPS[generation].slices]
    return InputError(
        f"--topology {shortened(text)}: no such slice ({shortened(str(why))}). "
        f"Known: {', '.join(known)}."
    )


def hide_accelerators() -> None:
    """Restrict JAX to the CPU of this machine; call it before JAX is imported.

    Planning must not occupy accelerators. The variables for libtpu keep it from probing
    for a TPU and from logging, and let other processes load it as well.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # any; the topology determines the chip
        "TPU_LOG_DIR": "disabled",
        "TPU_MIN_LOG_LEVEL": "3",
        "TPU_STDERR_LOG_LEVEL": "3",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
