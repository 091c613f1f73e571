"""Failing writes, killed processes, and several processes that save together."""

import contextlib
import gc
import logging
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from manifold_lora.checkpoints import store
from manifold_lora.checkpoints.store import CheckpointError
from tests.checkpoints import saving
from tests.checkpoints.saving import bits, opened

SMALL = {"u": jnp.arange(12.0).reshape(3, 4)}


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Limit the size of files: writing fails as on a full disk, even for root."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        time.sleep(0.2)  # see `left_running`
        gc.collect()
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


# When one write has failed, Orbax leaves others running and ignores their errors.
left_running = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)


@left_running
@pytest.mark.parametrize("size", [0, 200, 2000])
def test_a_failed_write_raises_once_and_earlier_checkpoints_stay(
    size: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    big = {"u": jax.random.normal(jax.random.key(0), (100, 100))}
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, big, {}, best_step=1)
        checkpoints.wait()
        with largest_file(size):
            checkpoints.save(2, big, {}, best_step=1)
            with pytest.raises(CheckpointError, match="/2 cannot be.*too large"):
                checkpoints.wait()
        assert checkpoints.steps == [1]
        restored = checkpoints.restore_latest(big)
        assert restored is not None and bits(restored.state) == bits(big)
        checkpoints.save(2, big, {}, best_step=1)
        checkpoints.wait()
        assert checkpoints.steps == [1, 2]
    assert not [record for record in caplog.records if record.name == "absl"]


@left_running
def test_the_next_save_and_the_exit_raise_a_failure(tmp_path: Path):
    with opened(tmp_path) as checkpoints:
        with largest_file(0):
            checkpoints.save(1, SMALL, {}, best_step=1)
            with pytest.raises(CheckpointError, match="/1 cannot"):
                checkpoints.save(2, SMALL, {}, best_step=1)
        checkpoints.save(2, SMALL, {}, best_step=1)
    with largest_file(0), pytest.raises(CheckpointError, match="/3 cannot"):
        with opened(tmp_path) as checkpoints:
            checkpoints.save(3, SMALL, {}, best_step=1)
    with largest_file(0), pytest.raises(KeyError) as caught:
        with opened(tmp_path) as checkpoints:
            checkpoints.save(4, SMALL, {}, best_step=1)
            raise KeyError("what went wrong first")
    assert "/4 cannot" in caught.value.__notes__[0]


@pytest.mark.parametrize("keep", [1, 2])
def test_a_failed_manifest_leaves_the_last_checkpoint(keep: int, tmp_path: Path):
    with opened(tmp_path, keep=keep) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, SMALL, {}, best_step=step)
        checkpoints.wait()
        full = mock.patch.object(store, "write_manifest", side_effect=OSError("full"))
        with full, pytest.raises(CheckpointError, match="/3 cannot be written: full"):
            checkpoints.save(3, SMALL, {}, best_step=3)
            checkpoints.wait()
        assert checkpoints.steps == [2]
        restored = checkpoints.restore_latest(SMALL)
        assert restored is not None and restored.step == 2
        assert sorted(os.listdir(tmp_path)) == ["2"]


def test_a_directory_that_cannot_be_created(tmp_path: Path):
    (tmp_path / "file").write_text("no directory")
    with opened(tmp_path / "file") as checkpoints:
        with pytest.raises(CheckpointError, match="file/1 cannot be written: .*exists"):
            checkpoints.save(1, SMALL, {}, best_step=1)


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if (
        shutil.which("mount") is None
        or subprocess.run(mount, capture_output=True).returncode
    ):
        pytest.skip("only root can mount a file system")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_full_disk(full_disk: Path):
    with opened(full_disk) as checkpoints:
        checkpoints.save(1, SMALL, {}, best_step=1)
        checkpoints.wait()
        (full_disk / "ballast").write_bytes(bytes(700_000))
        big = {"u": jax.random.normal(jax.random.key(0), (400, 300))}
        match = "/2 cannot.*No space left on device: 480000 bytes needed"
        with pytest.raises(CheckpointError, match=match):
            checkpoints.save(2, big, {}, best_step=1)
        assert bits(checkpoints.restore(1, SMALL).state) == bits(SMALL)
        (full_disk / "ballast").unlink()
        checkpoints.save(2, big, {}, best_step=1)
        assert bits(checkpoints.restore(2, big).state) == bits(big)


def test_orbax_is_quiet_and_others_are_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO, "absl")
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, SMALL, {}, best_step=1)
        checkpoints.restore(1, SMALL)
    logging.getLogger("absl").info("from another package")
    messages = [record.message for record in caplog.records if record.name == "absl"]
    assert messages == ["from another package"]


# Other processes


def start(*arguments: str | Path, devices: int = 1) -> subprocess.Popen[str]:
    flags = f"--xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-m", saving.__name__, *map(str, arguments)],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_killed_at_random_times(tmp_path: Path):
    newest = 0
    for seed in range(3):
        process = start(tmp_path)
        assert process.stdout is not None
        assert int(process.stdout.readline()) == newest + 1
        time.sleep(random.Random(seed).uniform(0, 0.5))
        process.kill()
        process.communicate()
        with opened(tmp_path) as checkpoints:
            restored = checkpoints.restore_latest({"u": jnp.zeros(saving.SHAPE)})
            assert checkpoints.skipped == []
        if restored is None:
            continue
        assert restored.step >= newest
        newest = restored.step
        assert restored.progress == {"step": newest}
        assert np.array_equal(restored.state["u"], saving.values(newest))
    assert newest > 0


@pytest.mark.slow
def test_two_processes_save_and_one_restores(tmp_path: Path):
    out = tmp_path / "[two]"  # which each process links to, see `PlainPath`
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [start(out, str(port), str(i), devices=2) for i in range(2)]
    printed = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(printed)
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec(None, "x"))
    u = jax.ShapeDtypeStruct(saving.SHAPE, jnp.float32, sharding=sharding)
    with opened(out) as checkpoints:
        assert checkpoints.steps == [1, 2, 6]
        restored = checkpoints.restore_latest({"u": u, "key": jax.random.key(0)})
    assert restored is not None and restored.step == 6
    assert np.array_equal(restored.state["u"], saving.values(2))
    assert restored.state["u"].sharding == sharding
    assert bits(restored.state["key"]) == bits(jax.random.key(2))
