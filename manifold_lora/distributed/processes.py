"""Multi-process runs: initialisation, agreement, lost processes and preemption."""

import contextlib
import glob
import hashlib
import itertools
import os
import re
import signal
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax import P
from jax.sharding import Mesh

from manifold_lora.distributed.launch import launch_problems
from manifold_lora.distributed.mesh import all_devices
from manifold_lora.errors import InputError, shortened
from manifold_lora.settings import raise_all

# Seconds without a heartbeat until a process counts as dead and the others are ended.
HEARTBEAT_TIMEOUT = 30
_INITIALISATION_TIMEOUT = 300  # seconds to wait for all processes to connect


def initialise(
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Connect to the other processes of this run, if there are any.

    Without arguments, the cluster is detected on TPU hosts, under Slurm's `srun` and
    under Open MPI's `mpirun`. Call it before any other use of JAX. If a process dies,
    all others are ended within about a minute.

    Args:
        coordinator: HOST:PORT of process 0, reachable from all others.
        processes: the number of processes.
        process_id: the index of this process, from 0.

    Raises:
        InputError: the arguments are malformed or incomplete, the processes cannot
            connect, or there are no devices.
    """
    arguments = (coordinator, processes, process_id)
    raise_all(launch_problems(*arguments))
    single = arguments == (None, None, None) and not _launched_as_several()
    if not (jax.distributed.is_initialized() or single):
        _connect(*arguments)
    all_devices()


def _connect(*arguments: Any) -> None:
    try:
        jax.distributed.initialize(
            *arguments,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
            shutdown_timeout_seconds=HEARTBEAT_TIMEOUT,
            initialization_timeout=_INITIALISATION_TIMEOUT,
        )
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"the processes of this run could not connect to each other ({error}). "
            "Give all of them the same --processes and --coordinator HOST:PORT (of "
            "process 0), and each its own --process-id."
        ) from error


def _launched_as_several() -> bool:
    """Whether a launcher started several processes, or this is a TPU host."""
    env = os.environ
    slurm = "SLURM_STEP_NODELIST" in env and _process_count("SLURM_NTASKS") > 1
    mpi = _process_count("OMPI_COMM_WORLD_SIZE") > 1
    hosts = env.get("TPU_WORKER_HOSTNAMES", "").count(",") > 0
    chips = bool(glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*"))
    tpu = chips and "tpu" in env.get("JAX_PLATFORMS", "tpu")
    return slurm or mpi or hosts or (tpu and "TPU_SKIP_MDS_QUERY" not in env)


def _process_count(variable: str) -> int:
    text = os.environ.get(variable, "1")
    if not re.fullmatch("[0-9]{1,9}", text):
        raise InputError(
            f"the environment variable {variable} must be the number of processes, got "
            f"{shortened(text)!r}: unset it, or start the processes with the launcher."
        )
    return int(text)


def is_main() -> bool:
    """Whether this is process 0, which alone writes files and prints."""
    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """Block until every process has reached the barrier of that name."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def connect_devices(mesh: Mesh) -> None:
    """Connect the CPU devices of different processes along all axes of the mesh.

    Call it right after `initialise`, when all processes get there at the same time.
    Without it a group of CPU devices connects in its first collective, for which no
    process waits longer than 30 seconds, although another may still be reading data or
    compiling; in later collectives they wait for each other for half an hour. Other
    devices and a single process need no connection.

    Args:
        mesh: of all devices of all processes.
    """
    if jax.process_count() == 1 or jax.default_backend() != "cpu":
        return
    wait_for_all("connected")  # the groups of `multihost_utils`
    jax.block_until_ready(_sum_over_all_axes(mesh)())


def _sum_over_all_axes(mesh: Mesh) -> Any:
    """A program with a collective over every sequence of mesh axes.

    The sequences ("data", "tensor") and ("tensor", "data") connect the same devices in
    different orders, which are different groups.
    """
    names = [axis for axis, size in mesh.shape.items() if size > 1]
    counts = range(1, len(names) + 1)
    sequences = [s for count in counts for s in itertools.permutations(names, count)]

    def program() -> jax.Array:
        total = jax.numpy.int32(0)
        for axes in sequences:
            total = jax.lax.psum(total + jax.lax.axis_index(tuple(names)), axes)
        return total

    return jax.jit(jax.shard_map(program, mesh=mesh, in_specs=(), out_specs=P()))


def check_identical(contents: Mapping[str, bytes]) -> None:
    """Raise `InputError` on every process if the contents differ between processes.

    Args:
        contents: bytes that must be the same everywhere, by name.
    """
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    digests = [hashlib.sha256(content).digest()[:8] for content in contents.values()]
    local = np.frombuffer(b"".join(digests), np.uint32).reshape(len(contents), 2)
    gathered = np.asarray(multihost_utils.process_allgather(local))
    differs = (gathered != gathered[0]).any(-1)  # (processes, contents)
    if differs.any():
        names = list(contents)
        messages = [
            f"the {names[content]} of process {process} differs from that of process 0"
            for process, content in np.argwhere(differs)
        ]
        raise InputError(
            "; ".join(messages) + ". All processes of a run must have the same "
            "configuration, data and code: launch them with one command, from one "
            "file system or identical copies."
        )


def source_code() -> bytes:
    """The version of JAX and the source of this package, as bytes to compare."""
    package = Path(__file__).parent.parent
    files = sorted(package.rglob("*.py"))
    return jax.__version__.encode() + b"".join(file.read_bytes() for file in files)


class ProcessLost(RuntimeError):
    """This process can no longer communicate with the others of its run."""


@contextlib.contextmanager
def report_lost_process() -> Iterator[None]:
    """Turn runtime errors of a multi-process run into `ProcessLost`.

    Raises:
        ProcessLost: a collective failed, most likely because another process died.
            Exit at once, without waiting for the others.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        reason = str(error).strip().partition("\n")[0]
        raise ProcessLost(
            f"process {jax.process_index()} lost contact with the others, most likely "
            f"because one of them died; see its output for the cause ({reason}). "
            "Restart all of them with the same command: the run resumes from its "
            "latest checkpoint."
        ) from error


class Preemption:
    """Whether any process of this run received SIGTERM.

    With several processes JAX's preemption service, which is also Orbax's
    `reached_preemption`, makes all of them stop after the same step. It needs
    `jax.distributed`: in a single process it always answers no, SIGTERM ends the
    process before a checkpoint is written, and it cannot be started once JAX is in use.
    So a single process handles the signal here.
    """

    def __init__(self) -> None:
        self._received = False
        self._previous_handler = signal.SIG_DFL

    def __enter__(self) -> "Preemption":
        # With several processes, JAX has its own handler.
        main_thread = threading.current_thread() is threading.main_thread()
        self._handles = jax.process_count() == 1 and main_thread
        if self._handles:
            self._previous_handler = signal.signal(signal.SIGTERM, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self._received = True

    def reached(self, step: int) -> bool:
        """Whether to stop after this step; the same on all processes."""
        if jax.process_count() == 1:
            return self._received
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)

    def __exit__(self, *exception: object) -> None:
        if self._handles:
            signal.signal(signal.SIGTERM, self._previous_handler)
