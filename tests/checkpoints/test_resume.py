"""A run resumes bit for bit; damage is named; checkpoints of other runs are errors."""

import math
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from manifold_lora.checkpoints.manifest import write_manifest
from manifold_lora.checkpoints.store import CheckpointStore, CorruptCheckpointError
from manifold_lora.errors import InputError
from tests.checkpoints.saving import bits, opened

SMALL = {"u": jnp.arange(12.0).reshape(3, 4)}


class State(NamedTuple):
    factors: Any
    opt_state: Any
    key: jax.Array


def small(step: int) -> dict[str, jax.Array]:
    return {"u": SMALL["u"] + step}


def trained(steps: int = 3) -> tuple[State, Callable[[State], State]]:
    """A state with every kind of leaf and node, and a step that donates it."""
    factors = {
        "wide": {"u": jax.random.normal(jax.random.key(0), (16, 4)), "none": None},
        "half": jnp.ones(3, jnp.bfloat16),
        "empty": jnp.zeros((0, 4)),
    }
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.masked(optax.adamw(1e-2), {"wide": True, "half": False, "empty": True}),
    )

    @partial(jax.jit, donate_argnums=0)
    def step(state: State) -> State:
        grads = jax.tree.map(jnp.cos, state.factors)
        updates, opt_state = tx.update(grads, state.opt_state, state.factors)
        factors = optax.apply_updates(state.factors, updates)
        return State(factors, opt_state, jax.random.split(state.key)[0])

    state = State(factors, tx.init(factors), jax.random.key(1, impl="rbg"))
    for _ in range(steps):
        state = step(state)
    return state, step


def test_state_and_progress_are_restored_bit_for_bit(tmp_path: Path):
    state, step = trained()
    before, like = bits(state), jax.eval_shape(lambda: state)
    progress = {"loss": [1 / 3, math.inf, 5e-324], "best": None, "name": "Stiefel Vᵀ"}
    with opened(tmp_path / "deep" / "checkpoints") as checkpoints:
        checkpoints.save(3, state, progress, best_step=3)
        step(step(state))  # which donates the arrays
    with opened(tmp_path / "deep" / "checkpoints") as checkpoints:
        assert checkpoints.steps == [3]
        restored = checkpoints.restore_latest(like)
    assert restored is not None and restored.step == 3
    assert restored.progress == progress
    assert bits(restored.state) == before
    assert jax.tree.structure(restored.state) == jax.tree.structure(like)
    assert restored.state.key.dtype == like.key.dtype


def test_progress_may_hold_nan(tmp_path: Path):
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, SMALL, {"loss": math.nan}, best_step=1)
        assert math.isnan(checkpoints.restore(1, SMALL).progress["loss"])


@pytest.mark.parametrize("shape", [(1, 1), (8, 1), (2, 4), (1, 2)])
def test_another_mesh(shape: tuple[int, int], tmp_path: Path):
    def placed(shape: tuple[int, int], *spec: str | None) -> NamedSharding:
        devices = jax.devices()[: math.prod(shape)]
        auto = (jax.sharding.AxisType.Auto,) * 2
        mesh = jax.make_mesh(shape, ("a", "b"), axis_types=auto, devices=devices)
        return NamedSharding(mesh, PartitionSpec(*spec))

    x = jnp.arange(64.0).reshape(8, 8)
    saved = {"x": jax.device_put(x, placed((4, 2), "a", "b"))}
    like = {"x": jax.ShapeDtypeStruct((8, 8), x.dtype, sharding=placed(shape, "b"))}
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, saved, {}, best_step=1)
        restored = checkpoints.restore(1, like).state["x"]
    assert bits(restored) == bits(x) and restored.sharding == like["x"].sharding


def test_the_last_and_the_best_are_kept(tmp_path: Path):
    with opened(tmp_path) as checkpoints:
        for step in range(1, 7):
            checkpoints.save(step, small(step), {}, best_step=min(step, 2))
        checkpoints.wait()
        assert checkpoints.steps == [2, 5, 6]
        assert sorted(os.listdir(tmp_path)) == ["2", "5", "6"]
        for step in checkpoints.steps:
            assert bits(checkpoints.restore(step, SMALL).state) == bits(small(step))


def test_the_first_of_equally_good_ones_is_kept(tmp_path: Path):
    with opened(tmp_path, keep=1) as checkpoints:
        for step, best in [(1, 1), (2, 1), (3, 3), (4, 3), (5, 3)]:
            checkpoints.save(step, small(step), {}, best_step=best)
            checkpoints.wait()
            assert checkpoints.steps == sorted({step, best})
    assert sorted(os.listdir(tmp_path)) == ["3", "5"]


@pytest.mark.parametrize("keep", [1, 2])
def test_retention_resumes_with_the_run(keep: int, tmp_path: Path):
    for step, best in enumerate([1, 2, 2, 2, 5, 5], start=1):
        with opened(tmp_path, keep=keep) as checkpoints:
            restored = checkpoints.restore_latest(SMALL)
            assert restored is None or restored.step == step - 1
            checkpoints.save(step, small(step), {}, best_step=best)
    with opened(tmp_path) as checkpoints:
        assert checkpoints.steps == [5, 6]


def test_an_existing_step_is_not_written_again(tmp_path: Path):
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, small(1), {"n": 1}, best_step=1)
        checkpoints.save(1, small(2), {"n": 2}, best_step=1)
        assert checkpoints.restore(1, SMALL).progress == {"n": 1}


def test_size_on_disk(tmp_path: Path):
    factors = {
        f"u{i}": jax.random.normal(jax.random.key(i), (3000, 16)) for i in [1, 2]
    }
    state = (factors, optax.adam(1.0).init(factors))
    factor_bytes = sum(x.nbytes for x in factors.values())
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, state, {}, best_step=1)
    on_disk = sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file())
    assert on_disk < 4 * factor_bytes


# Damage


def files(checkpoint: Path) -> list[Path]:
    return sorted(p for p in checkpoint.rglob("*") if p.is_file())


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("two")
    with opened(path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, small(step), {"n": step}, best_step=1)
    return path


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
def test_damage_to_any_file_is_named_and_the_previous_restored(
    damage: Callable[[Path], None], two: Path, tmp_path: Path
):
    assert len(files(two / "2")) > 8
    for number, original in enumerate(files(two / "2")):
        path = shutil.copytree(two, tmp_path / str(number))
        file = path / original.relative_to(two)
        damage(file)
        with opened(path) as checkpoints:
            restored = checkpoints.restore_latest(SMALL)
            assert restored is not None and restored.step == 1
            assert bits(restored.state) == bits(small(1))
            if damage is Path.unlink and file.name == "manifest.json":
                assert checkpoints.skipped == []  # as if killed before it was finished
                continue
            [line] = checkpoints.skipped
            assert line.startswith(f"{path / '2'}: ")
            name = str(file.relative_to(path / "2"))
            # the flipped bit of the manifest may be in another file's hash
            assert name in line or (damage is flip and name == "manifest.json")
            with pytest.raises(CorruptCheckpointError, match="/2: "):
                checkpoints.restore(2, SMALL)


def test_a_corrupt_checkpoint_is_replaced_and_does_not_count(two: Path, tmp_path: Path):
    path = shutil.copytree(two, tmp_path / "run")
    truncate(files(path / "2")[0])
    with opened(path) as checkpoints:
        checkpoints.save(2, small(5), {"n": 5}, best_step=2)  # without restoring before
        assert checkpoints.restore(2, SMALL).progress == {"n": 5}
        truncate(files(path / "2")[0])
        assert checkpoints.restore_latest(SMALL) is not None
        checkpoints.save(3, small(3), {}, best_step=3)
        checkpoints.wait()
        assert checkpoints.steps == [1, 3]


def test_later_checkpoints_of_an_abandoned_run_are_deleted(two: Path, tmp_path: Path):
    path = shutil.copytree(two, tmp_path / "run")
    with opened(path) as checkpoints:
        assert checkpoints.restore(1, SMALL).step == 1
        checkpoints.save(1, SMALL, {}, best_step=1)
        checkpoints.save(0, SMALL, {}, best_step=0)
        checkpoints.wait()
        assert checkpoints.steps == [0]


def test_other_files_and_directories_are_left_alone(two: Path, tmp_path: Path):
    path = shutil.copytree(two, tmp_path / "run")
    backup = shutil.copytree(two / "2", path / "2.backup")
    for name in ("9.orbax-checkpoint-tmp", "4"):  # of killed processes
        (path / name).mkdir()
    with opened(path) as checkpoints:
        checkpoints.save(3, small(3), {}, best_step=3)
    assert sorted(os.listdir(path)) == ["1", "2", "2.backup", "3"]
    assert len(files(backup)) == len(files(two / "2"))


def test_if_all_are_corrupt_the_error_names_each(two: Path, tmp_path: Path):
    path = shutil.copytree(two, tmp_path / "run")
    (path / "1" / "run.json").unlink()
    truncate(path / "2" / "run.json")
    with opened(path) as checkpoints, pytest.raises(InputError) as caught:
        checkpoints.restore_latest(SMALL)
    text = str(caught.value)
    assert f"{path}/1: run.json is missing" in text
    assert f"{path}/2: run.json has" in text and "--overwrite" in text


def test_what_orbax_cannot_read_is_corrupt(two: Path, tmp_path: Path):
    path = shutil.copytree(two, tmp_path / "run")
    for file in (path / "2" / "state" / "d").iterdir():
        truncate(file)
    write_manifest(path / "2")  # as if Orbax had written it so
    with opened(path) as checkpoints:
        restored = checkpoints.restore_latest(SMALL)
        assert restored is not None and restored.step == 1
        assert "2: cannot be read" in checkpoints.skipped[0]
        checkpoints.save(2, small(2), {}, best_step=1)
        assert bits(checkpoints.restore(2, SMALL).state) == bits(small(2))


def test_without_a_finished_checkpoint_there_is_none(two: Path, tmp_path: Path):
    with opened(tmp_path / "none") as checkpoints:
        assert checkpoints.restore_latest(SMALL) is None and checkpoints.steps == []
        with pytest.raises(CorruptCheckpointError, match="none/7: is missing"):
            checkpoints.restore(7, SMALL)
    assert not (tmp_path / "none").exists()
    path = shutil.copytree(two, tmp_path / "run")
    for step in "12":
        (path / step / "manifest.json").unlink()
    (path / "notes.txt").write_text("of the user")
    with opened(path) as checkpoints:
        assert checkpoints.restore_latest(SMALL) is None and checkpoints.skipped == []
        checkpoints.save(5, SMALL, {}, best_step=5)
    assert sorted(os.listdir(path)) == ["5", "notes.txt"]


# Other runs


def test_a_checkpoint_of_another_run_raises(two: Path):
    identity = {"method": "lora", "base": "ab12", "rank": 16}
    other = CheckpointStore(two, identity=identity)
    with other, pytest.raises(InputError) as caught:
        other.restore_latest(SMALL)
    text = str(caught.value)
    assert "base: found none, needed ab12; method: found stella, needed lora" in text
    assert "rank" not in text and "--out" in text and not other.skipped


def test_other_arrays_raise(two: Path):
    like = {"u": jnp.zeros((3, 5)), "v": {"key": jax.random.key(0, impl="rbg")}}
    with opened(two) as checkpoints, pytest.raises(InputError) as caught:
        checkpoints.restore_latest(like)
    assert "u: found float32[3,4], needed float32[3,5]" in str(caught.value)
    assert "v/key: found none, needed key<rbg>[]" in str(caught.value)
