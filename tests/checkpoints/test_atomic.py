"""A directory or file is complete or absent, and an older one is never lost."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from manifold_lora.checkpoints.atomic import (
    atomic_directory,
    atomic_file,
    recover,
    write_text,
)


def names(path: Path) -> list[str]:
    return sorted(os.listdir(path))


def fill(path: Path, **files: str) -> Path:
    path.mkdir()
    for name, text in files.items():
        (path / name).write_text(text)
    return path


def test_the_directory_appears_when_the_block_ends(tmp_path: Path):
    path = tmp_path / "deep" / "er" / "out"
    with atomic_directory(path) as partial:
        (partial / "a").write_text("1")
        assert not path.exists() and partial.parent == path.parent
    assert names(path) == ["a"] and names(path.parent) == ["out"]


def test_a_relative_path_survives_a_change_of_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(fill(tmp_path / "here"))
    with atomic_directory("out") as partial:
        (partial / "a").write_text("1")
        monkeypatch.chdir(tmp_path)
    assert names(tmp_path / "here" / "out") == ["a"]


def test_an_older_directory_is_replaced_entirely(tmp_path: Path):
    path = fill(tmp_path / "out", a="old", b="old")
    with atomic_directory(path) as partial:
        (partial / "a").write_text("new")
        assert (path / "a").read_text() == "old"
    assert names(path) == ["a"] and (path / "a").read_text() == "new"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("older", [True, False], ids=["older", "first"])
@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt])
def test_a_failure_leaves_the_older_directory_untouched(
    failure: BaseException, older: bool, tmp_path: Path
):
    path = tmp_path / "out"
    if older:
        fill(path, a="old")
    with pytest.raises((OSError, KeyboardInterrupt)), atomic_directory(path) as partial:
        (partial / "a").write_text("half")
        raise failure
    assert names(tmp_path) == (["out"] if older else [])
    assert not older or (path / "a").read_text() == "old"


def test_a_failure_of_the_last_rename_restores_the_older_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = fill(tmp_path / "out", a="old")
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError(errno.EIO, "no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="no"), atomic_directory(path) as partial:
        (partial / "a").write_text("new")
    assert names(tmp_path) == ["out"] and (path / "a").read_text() == "old"


def test_leftovers_of_a_killed_process_with_the_same_id_are_removed(tmp_path: Path):
    path = fill(tmp_path / "out", a="old")
    fill(tmp_path / f".out.{os.getpid()}.partial", b="half")
    fill(tmp_path / f".out.{os.getpid()}.old", c="older")
    with atomic_directory(path) as partial:
        (partial / "a").write_text("new")
    assert names(tmp_path) == ["out"] and names(path) == ["a"]


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_file_permissions_follow_the_umask(umask: int, tmp_path: Path):
    before = os.umask(umask)
    try:
        with atomic_directory(tmp_path / "out") as partial:
            os.close(os.open(partial / "private", os.O_CREAT, 0o600))
            (partial / "plain").write_text("1")
    finally:
        os.umask(before)
    modes = {
        (tmp_path / "out" / name).stat().st_mode & 0o777
        for name in ("private", "plain")
    }
    assert modes == {0o666 & ~umask}


@pytest.mark.parametrize("older", [True, False], ids=["older", "first"])
def test_a_text_is_written_atomically(older: bool, tmp_path: Path):
    path = tmp_path / "text"
    if older:
        path.write_text("a longer old text")
    write_text(path, "U Σ Vᵀ\n")
    assert path.read_text(encoding="utf-8") == "U Σ Vᵀ\n"
    assert names(tmp_path) == ["text"]


def test_a_failed_text_write_leaves_the_older_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "text"
    path.write_text("old")

    def fail(self: Path, text: str, encoding: str) -> None:
        self.write_bytes(text[:1].encode(encoding))
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(OSError, match="full"):
        write_text(path, "new")
    assert names(tmp_path) == ["text"] and path.read_text() == "old"


@pytest.mark.parametrize("name", ["p.png", "no suffix", 120 * "ü" + ".json"])
def test_a_partial_file_has_the_suffix_of_the_file(name: str, tmp_path: Path):
    path = tmp_path / name
    path.write_bytes(b"old")
    with atomic_file(path) as partial:
        assert partial.suffix == path.suffix or not path.suffix
        assert partial.name.startswith(".") and partial.parent == tmp_path
        partial.write_bytes(b"new")
        assert path.read_bytes() == b"old"
    assert names(tmp_path) == [name] and path.read_bytes() == b"new"


def test_a_killed_process_leaves_the_older_file(tmp_path: Path):
    path = tmp_path / "p.png"
    path.write_bytes(b"old")
    code = (
        "import os, signal, sys\n"
        "from manifold_lora.checkpoints.atomic import atomic_file\n"
        "with atomic_file(sys.argv[1]) as partial:\n"
        "    partial.write_bytes(b'ha')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, path], check=False)
    assert done.returncode == -signal.SIGKILL and path.read_bytes() == b"old"
    (other,) = set(names(tmp_path)) - {path.name}
    assert other.startswith(".")


def test_recover_restores_the_older_directory(tmp_path: Path):
    fill(tmp_path / ".out.7.old", a="old")
    fill(tmp_path / ".out.7.partial", a="half")
    recover(tmp_path / "out")
    assert names(tmp_path) == ["out"] and (tmp_path / "out" / "a").read_text() == "old"


def test_recover_removes_only_stale_leftovers(tmp_path: Path):
    path = fill(tmp_path / "out", a="new")
    others = [".out.1.7.old", ".output.7.partial", ".out.seven.old", "out.7.old"]
    for name in (".out.7.old", ".out.8.partial", *others):
        fill(tmp_path / name, a="old")
    recover(path)
    assert names(tmp_path) == sorted(["out", *others]) and names(path) == ["a"]
    assert (path / "a").read_text() == "new"


def test_recover_ignores_a_missing_parent(tmp_path: Path):
    recover(tmp_path / "no" / "out")
    assert names(tmp_path) == []


@pytest.mark.parametrize("name", ["x" * 255, "é" * 127])
def test_names_as_long_as_a_file_system_has_them(name: str, tmp_path: Path):
    path = tmp_path / name
    with atomic_directory(path) as partial:
        (partial / "a").write_text("1")
    with atomic_directory(path) as partial:
        (partial / "a").write_text("2")
    left = partial.with_suffix(".old")  # of a process killed in between
    path.rename(left)
    recover(path)
    assert names(tmp_path) == [name] and (path / "a").read_text() == "2"
