"""The command line of `manifold-lora inspect`: help, exit codes and messages."""

import errno
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file, save_file

import manifold_lora as ml
from manifold_lora.cli.main import main
from manifold_lora.inspection.inspect import inspect_adapter
from tests.inspection.runs import run_directory


def corrupt(path, key, value):
    """Write a value into a tensor of an adapter's file."""
    file = path / "adapter_model.safetensors"
    tensors = load_file(file)
    next(x for name, x in tensors.items() if key in name)[0, 0] = value
    save_file(tensors, file)


def bad_inputs(folder):
    """Arguments, and a part of the message, by case."""
    run = folder / "run"
    run_directory(run, "lora")
    nan = folder / "nan"
    run_directory(nan, "lora")
    corrupt(nan / "adapter", "layers.1.self_attn.q_proj.lora_A", np.nan)
    corrupt(nan / "adapter", "layers.0.mlp.down_proj.lora_B", np.inf)
    other = folder / "other"
    run_directory(other, "lora")
    run_directory(folder / "stella", "stella")
    (folder / "stella" / "start").rename(folder / "start")
    for file in (other / "start").iterdir():
        file.unlink()
    (other / "start").rmdir()
    (folder / "start").rename(other / "start")
    empty = folder / "empty"
    empty.mkdir()
    unfinished = folder / "unfinished"
    unfinished.mkdir()
    (unfinished / "config.toml").touch()
    file = folder / "file"
    file.touch()
    return {
        "missing": ((folder / "none",), "none does not exist"),
        "a file": ((file,), "is a file"),
        "neither": ((empty,), "adapter_config.json"),
        "unfinished": ((unfinished,), "a run without an adapter/"),
        "nan": ((nan,), "layers.1.self_attn.q_proj.lora_A.weight: has NaN"),
        "all bad modules": ((nan,), "layers.0.mlp.down_proj.lora_B.weight: has NaN"),
        "another start": ((other,), "start/ is not the initialisation of this adapter"),
        "out is a file": ((run, "--out", file), "file is a file"),
        "out is the adapter": ((run, "--out", run / "adapter"), "inside the adapter"),
        "out is in it": ((run, "--out", run / "adapter" / "x"), "inside the adapter"),
    }


def test_bad_input_is_one_message_and_exit_code_2(capsys, tmp_path):
    failures = {}
    for name, (arguments, message) in bad_inputs(tmp_path).items():
        with pytest.raises(SystemExit) as stopped:
            main(["inspect", *map(str, arguments)])
        error = capsys.readouterr().err
        if stopped.value.code != 2 or message not in error or "Traceback" in error:
            failures[name] = (stopped.value.code, error)
    assert failures == {}
    assert not list(tmp_path.rglob("*.png"))


def test_debug_shows_the_traceback():
    with pytest.raises(ml.InputError, match="does not exist"):
        main(["inspect", "/nowhere", "--debug"])


def test_the_command(capsys, tmp_path):
    run_directory(tmp_path / "run", "landing_oblique")
    main(["inspect", str(tmp_path / "run"), "--out", str(tmp_path / "out")])
    shown = capsys.readouterr().out
    assert "landing_oblique" in shown and "gram.png" in shown
    assert (tmp_path / "out" / "inspect.json").is_file()


def test_a_full_disk_leaves_the_earlier_report(tmp_path, monkeypatch):
    run_directory(tmp_path / "run", "lora")
    inspect_adapter(tmp_path / "run", console=Console(quiet=True))
    out = tmp_path / "run" / "inspect"
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert len(before) == 4
    replace = Path.replace
    for name in before:

        def full(self, target, name=name):
            if target.name == name:
                raise OSError(errno.ENOSPC, "full")
            return replace(self, target)

        monkeypatch.setattr(Path, "replace", full)
        with pytest.raises(OSError, match="full"):
            inspect_adapter(tmp_path / "run", console=Console(quiet=True))
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_help_imports_no_jax():
    code = (
        "import sys; from manifold_lora.cli.main import main\n"
        "try: main(['inspect', '--help'])\n"
        "except SystemExit as stopped: code = stopped.code\n"
        "print(code, sorted({'jax', 'flax', 'numpy', 'matplotlib'} & {*sys.modules}))"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert process.stdout.strip().endswith("0 []")
    assert "--out" in process.stdout
