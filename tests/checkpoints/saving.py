"""Programs that save checkpoints, for subprocesses: `saving.py DIRECTORY [PORT ID]`."""

import itertools
import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from manifold_lora.checkpoints import store
from manifold_lora.checkpoints.store import CheckpointError, CheckpointStore

opened = partial(CheckpointStore, identity={"method": "stella", "rank": 16})
SHAPE = (8, 1000)


def bits(tree: Any) -> list[tuple[Any, ...]]:
    plain = [
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        for x in jax.tree.leaves(tree)
    ]
    return [(x.dtype, x.shape, np.asarray(x).tobytes()) for x in plain]


def values(step: int) -> np.ndarray:
    return np.random.default_rng(step).standard_normal(SHAPE, np.float32)


def save_forever(directory: Path) -> None:
    with opened(directory) as checkpoints:
        before = checkpoints.restore_latest({"u": jnp.zeros(SHAPE)})
        for step in itertools.count(before.step + 1 if before else 1):
            state = {"u": jnp.asarray(values(step))}
            checkpoints.save(step, state, {"step": step}, best_step=1)
            print(step, flush=True)


def save_together(directory: Path, port: str, process: int) -> None:
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, process)
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("rows"))
    everywhere = NamedSharding(mesh, PartitionSpec())
    # Asked by Orbax from its thread, JAX would lose count of the steps.
    asked = mock.patch.object(multihost_utils, "reached_preemption_sync_point")
    with asked as reached_preemption, opened(directory) as checkpoints:
        for step in (1, 2, 3):
            of = values(step)
            u = jax.make_array_from_callback(SHAPE, sharding, lambda at, of=of: of[at])
            key = jax.jit(jax.random.key, out_shardings=everywhere)(step)
            state = {"u": u, "key": key}
            checkpoints.save(step, state, {"step": step}, best_step=1)
        checkpoints.wait()
        if process == 0:  # damage that both must learn of
            file = max((directory / "3").rglob("*"), key=lambda p: p.stat().st_size)
            file.write_bytes(file.read_bytes()[:-1])
        restored = checkpoints.restore_latest(state)
        assert restored is not None and restored.step == 2
        assert len(checkpoints.skipped) == 1, checkpoints.skipped
        for shard in restored.state["u"].addressable_shards:
            np.testing.assert_array_equal(shard.data, values(2)[shard.index])
        checkpoints.save(2, state, {}, best_step=1)  # exists: nothing to do
        if process == 0:  # what fails in one must raise in both
            (directory / "4").write_text("in the way")
        try:
            checkpoints.save(4, state, {}, best_step=1)
        except CheckpointError as error:
            assert "exists" in str(error)
        else:
            raise AssertionError("did not raise in both")
        with mock.patch.object(store, "write_manifest", side_effect=OSError("full")):
            checkpoints.save(5, state, {}, best_step=1)
            try:
                checkpoints.wait()
            except CheckpointError as error:
                assert ("full" if process == 0 else "Process 0") in str(error)
            else:
                raise AssertionError("did not raise in both")
        checkpoints.save(6, restored.state, {"step": 6}, best_step=1)
        checkpoints.wait()
        assert not reached_preemption.called
    jax.distributed.shutdown()


if __name__ == "__main__":
    if sys.argv[2:]:
        save_together(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
    else:
        save_forever(Path(sys.argv[1]))
