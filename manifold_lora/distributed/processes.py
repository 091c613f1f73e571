"""Several processes as one program: how they find each other, agree, and end."""

import contextlib
import glob
import hashlib
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType

import jax
import numpy as np

from manifold_lora.errors import InputError

# Seconds until a process that no longer answers counts as dead, and ends the others.
HEARTBEAT = 30
_JOIN = 300  # seconds that processes wait for the last one to come


def start(
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Join the other processes of this run, if there are any.

    Without arguments they are found as the launcher tells: on TPU hosts, under Slurm's
    `srun` and Open MPI's `mpirun`. Call it before anything else of JAX. A process that
    dies ends all others within about a minute.

    Args:
        coordinator: HOST:PORT of process 0, which all others can reach.
        processes: how many there are.
        process_id: the number of this one, from 0.

    Raises:
        InputError: the arguments are incomplete, or the processes do not find each
            other.
    """
    given = (coordinator, processes, process_id)
    alone = given == (None, None, None) and not _launched()
    if jax.distributed.is_initialized() or alone:
        return
    if processes is not None and not 0 <= (process_id or 0) < processes:
        raise InputError(
            f"--process-id {process_id} must be 0 to {processes - 1}, for --processes "
            f"{processes}."
        )
    try:
        jax.distributed.initialize(
            *given,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=HEARTBEAT,
            initialization_timeout=_JOIN,
        )
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"the processes of this run did not find each other ({error}). Give all of "
            "them --coordinator HOST:PORT of process 0 and --processes, and each its "
            "own --process-id."
        ) from error


def _launched() -> bool:
    """Whether a launcher started several processes, or this is a host of a TPU."""
    env = os.environ
    slurm = "SLURM_STEP_NODELIST" in env and int(env.get("SLURM_NTASKS", 1)) > 1
    mpi = int(env.get("OMPI_COMM_WORLD_SIZE", 1)) > 1
    hosts = env.get("TPU_WORKER_HOSTNAMES", "").count(",") > 0
    chips = bool(glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*"))
    tpu = chips and "tpu" in env.get("JAX_PLATFORMS", "tpu")
    return slurm or mpi or hosts or (tpu and "TPU_SKIP_MDS_QUERY" not in env)


def is_main() -> bool:
    """Whether this is the process that writes and speaks."""
    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Go on when every process is here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(what)


def agree(texts: Mapping[str, bytes]) -> None:
    """Raise `InputError` on every process if one of them holds something else.

    Args:
        texts: what must be the same everywhere, by what it is called.
    """
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    digests = [hashlib.sha256(text).digest()[:8] for text in texts.values()]
    mine = np.frombuffer(b"".join(digests), np.uint32).reshape(len(texts), 2)
    # (processes, texts): whether it is what process 0 holds
    every = np.asarray(multihost_utils.process_allgather(mine))
    same = (every == every[0]).all(-1)
    if not same.all():
        differing = [
            f"process {process} has other {name} than process 0"
            for process, name in zip(*np.nonzero(~same), strict=True)
            for name in [list(texts)[name]]
        ]
        raise InputError(
            "; ".join(differing) + ". All processes of a run must have the same "
            "configuration, data and code: start them with one command, from one "
            "file system or equal copies."
        )


def source_code() -> bytes:
    """The source of this package and the version of JAX, as one text."""
    package = Path(__file__).parent.parent
    files = sorted(package.rglob("*.py"))
    return jax.__version__.encode() + b"".join(file.read_bytes() for file in files)


class Lost(RuntimeError):
    """The processes of a run no longer work together."""


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Raise `Lost` where the work of several processes fails.

    Raises:
        Lost: most often because one of them is gone. Only ending this process helps,
            at once and without waiting for the others.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        reason = str(error).strip().partition("\n")[0]
        raise Lost(
            f"process {jax.process_index()} cannot work with the others any more; most "
            f"often one of them is gone, and its own output says why ({reason}). Start "
            "all of them again with the same command: the run goes on from its newest "
            "checkpoint."
        ) from error


class Preemption:
    """Whether this run has been told to end, by SIGTERM to any of its processes."""

    def __init__(self) -> None:
        self._told = False
        self._before = signal.SIG_DFL

    def __enter__(self) -> "Preemption":
        # JAX listens by itself where there are several processes.
        self._alone = jax.process_count() == 1
        if self._alone and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._listen)
        else:
            self._alone = False
        return self

    def _listen(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self._told = True

    def reached(self, step: int) -> bool:
        """True after the same step on all processes."""
        if jax.process_count() == 1:
            return self._told
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)

    def __exit__(self, *exception: object) -> None:
        if self._alone:
            signal.signal(signal.SIGTERM, self._before)
