"""TPU generations and slices of them: what a plan needs to know. Imports no JAX."""

import math
import os
import re
from dataclasses import dataclass

from manifold_lora.errors import InputError, nearest


@dataclass(frozen=True)
class Chip:
    """One chip of a generation."""

    flops: float  # a second, bfloat16, at peak
    memory: float  # bytes that a program may use, by the compiler's own word
    memory_bandwidth: float  # bytes a second
    link: float  # bytes a second of one link in one direction
    dimensions: int  # of the torus; two links in each
    price: float  # dollars of a chip-hour
    slices: tuple[str, ...]  # that can be rented, the usual ones


_SQUARES = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")

# Peak, memory bandwidth, shapes of slices, and the link as the bandwidth of a chip
# over its links: Google Cloud's pages "TPU v5e", "TPU v5p", "TPU v6e" (400, 1200 and
# 800 GB/s over 4, 6 and 4 links, both directions) and "TPU v4"; v4's links and memory
# bandwidth: Jouppi et al. 2023, "TPU v4: An Optically Reconfigurable Supercomputer".
# Memory: the "available HBM" of libtpu's message for a program that is too large.
# Prices: Google Cloud's page "Cloud TPU pricing", United States, on demand, as of
# 2025; they change, and --price takes another.
CHIPS = {
    "v4": Chip(275e12, 30.75 * 2**30, 1200e9, 50e9, 3, 3.22, _CUBES),
    "v5e": Chip(197e12, 15.75 * 2**30, 819e9, 50e9, 2, 1.20, _SQUARES),
    "v5p": Chip(459e12, 95.74 * 2**30, 2765e9, 100e9, 3, 4.20, _CUBES),
    "v6e": Chip(918e12, 31.25 * 2**30, 1638e9, 100e9, 2, 2.70, _SQUARES),
}


@dataclass(frozen=True)
class Topology:
    """A slice: a generation, and how many chips it has in each direction."""

    generation: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.generation}:{'x'.join(map(str, self.shape))}"

    @property
    def chip(self) -> Chip:
        """What each of its chips is."""
        return CHIPS[self.generation]

    @property
    def count(self) -> int:
        """The number of chips."""
        return math.prod(self.shape)

    @property
    def wraps(self) -> tuple[bool, ...]:
        """In which directions the last chip is linked with the first.

        In three dimensions in all if the slice is made of whole cubes of 4×4×4, in two
        only in a direction as long as the pod, 16.
        """
        if len(self.shape) == 3:
            return (all(size % 4 == 0 for size in self.shape),) * 3
        return tuple(size == 16 for size in self.shape)


def read_topology(text: str) -> Topology:
    """The slice of a name such as "v5p:8x8x8".

    Raises:
        InputError: an unknown generation, or sizes that no slice of it has.
    """
    generation, _, sizes = text.partition(":")
    if generation not in CHIPS:
        raise InputError(
            f"--topology {text}: unknown generation {generation!r}. "
            f"{nearest(generation, CHIPS)} Write it as in v5p:8x8x8."
        )
    chip = CHIPS[generation]
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)" + f"{{{chip.dimensions - 1}}}", sizes):
        raise unknown_slice(text, f"it needs {chip.dimensions} sizes, got {sizes!r}")
    return Topology(generation, tuple(int(size) for size in sizes.split("x")))


def unknown_slice(text: str, why: str) -> InputError:
    """The error for a slice that there is not, with those that there are."""
    generation = text.partition(":")[0]
    known = [f"{generation}:{sizes}" for sizes in CHIPS[generation].slices]
    return InputError(
        f"--topology {text}: no such slice ({why}). Known: {', '.join(known)}."
    )


def without_accelerator() -> None:
    """Let JAX compile on this machine's CPU only; call it before JAX is imported.

    A plan must not take the accelerators of a machine that has some. libtpu is told
    not to look for a TPU, to write no logs, and that another process may use it too.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # any; the topology says which
        "TPU_LOG_DIR": "disabled",
        "TPU_MIN_LOG_LEVEL": "3",
        "TPU_STDERR_LOG_LEVEL": "3",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
