"""Checkpoints under forty kinds of names: saved, restored, equal."""

import json

import jax.numpy as jnp
import pytest

from manifold_lora.checkpoints.store import CheckpointStore, CorruptCheckpointError
from manifold_lora.errors import InputError

NAMES = [
    *("plain", "a b", "r[bold]x", "q[/red]y", "[a-z]", "[!x]", "[", "]", "[[", "x[0]"),
    *("a*b", "**", "a?b", "back\\slash", "a\\", "\\[x\\]", "{curly}", "{a,b}", "a,b"),
    *("$HOME", "%20", "#hash", "&amp", "semi;colon", "quo'te", 'dq"uote', "`tick`"),
    *("émoji😀", "Ελλάδα", "-dash", ".hidden", "trail.", "~", "tab\tx", "new\nline"),
    *("a:b", "gs:", "file:", "a|b", "<tag>", "a=b+c@d!", "(p)", "x" * 200, " lead"),
]


@pytest.mark.parametrize("name", NAMES)
def test_save_and_restore(name, tmp_path):
    state = {"a": jnp.arange(6.0).reshape(2, 3)}
    directory = tmp_path / name / "checkpoints"
    with CheckpointStore(directory, identity={}, keep=1) as store:
        for step in (1, 2):
            store.save(step, {"a": state["a"] * step}, {"p": step}, best_step=step)
    with CheckpointStore(directory, identity={}) as store:
        restored = store.restore_latest(state)
    assert restored is not None and restored.step == 2
    assert (restored.state["a"] == 2 * state["a"]).all()
    assert [p.name for p in directory.iterdir()] == ["2"]


def test_a_name_of_the_directory_itself(tmp_path, monkeypatch):
    state = {"a": jnp.ones(3)}
    with CheckpointStore(tmp_path / "r[bold]x", identity={}) as store:
        store.save(1, state, {}, best_step=1)
        assert store.restore_latest(state) is not None
    (tmp_path / "t[mp]").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "t[mp]"))
    with pytest.raises(InputError, match="TMPDIR"):
        CheckpointStore(tmp_path / "r[bold]x", identity={})


def saved(tmp_path):
    state = {"a": jnp.ones(3)}
    with CheckpointStore(tmp_path, identity={}) as store:
        for step in (1, 2):
            store.save(step, state, {}, best_step=step)
    return state


def test_a_checkpoint_under_another_number_is_refused(tmp_path):
    state = saved(tmp_path)
    (tmp_path / "2").rename(tmp_path / "7")
    with CheckpointStore(tmp_path, identity={}) as store:
        restored = store.restore_latest(state)
        assert restored is not None and restored.step == 1
        assert "7: is the checkpoint of step 2" in store.skipped[0]
        with pytest.raises(CorruptCheckpointError, match="step 2 under another name"):
            store.restore(7, state)


@pytest.mark.parametrize(
    "manifest", ["{}", "[]", "", '{"run.json": 3}', "[" * 100000, '{"run.json": [1]}']
)
def test_a_manifest_without_its_files_is_no_checkpoint(tmp_path, manifest):
    state = saved(tmp_path)
    for step in ("1", "2"):
        (tmp_path / step / "manifest.json").write_text(manifest)
    with CheckpointStore(tmp_path, identity={}) as store:
        with pytest.raises(InputError, match=r"2: manifest\.json"):
            store.restore_latest(state)


def test_a_file_that_the_manifest_does_not_list(tmp_path):
    state = saved(tmp_path)
    (tmp_path / "2" / ".DS_Store").write_text("")
    with CheckpointStore(tmp_path, identity={}) as store:
        restored = store.restore_latest(state)
        assert restored is not None and restored.step == 2
    manifest = tmp_path / "2" / "manifest.json"
    files = json.loads(manifest.read_text())
    name = next(name for name in files if "/d/" in name)
    del files[name]
    manifest.write_text(json.dumps(files))
    with CheckpointStore(tmp_path, identity={}) as store:
        restored = store.restore_latest(state)
        assert restored is not None and restored.step == 1
        assert f"manifest.json lacks {name}" in store.skipped[0]
