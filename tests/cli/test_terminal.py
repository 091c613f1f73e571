"""The command on terminals that lack characters, width, colour or a reader."""

import os
import subprocess
import sys

import pytest

from manifold_lora.cli.main import main
from tests.compilation import xla_flags
from tests.tiny import data_file, model_directory

COMMAND = [sys.executable, "-c", "from manifold_lora.cli.main import main; main()"]


def call(capsys, *arguments):
    """Exit code, stdout and stderr of the command, run in this process."""
    code = 0
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stopped:
        code = stopped.code
    return code, *capsys.readouterr()


def test_without_a_command_it_prints_its_help(capsys):
    assert call(capsys) == call(capsys, "--help")
    code, shown, error = call(capsys)
    assert code == 0 and error == "" and "train" in shown


MESSAGES = [
    (["trian"], "there is no command 'trian'. Did you mean train? Known: compare,"),
    ([""], "there is no command ''. Known: compare,"),
    (["[bold]x"], "there is no command '[bold]x'."),
    (["inspect", "~nobody-here"], "the home of a user who does not exist"),
    (["inspect", "a" * 300], "names have at most 255 bytes"),
    (["train", "--seed", 2**32], "--seed must be at least 0, at most 4294967295"),
    (["train", "--mesh", f"data={'9' * 5000}"], "positive integer up to 999999"),
    (["train", "--coordinator", "a"], "--coordinator must be HOST:PORT"),
    (["train", "--adapter", "a" * 300], "--adapter must be a path whose names have"),
    (["train", "--config", "a\0b"], "--config must be a path without NUL"),
    (["train", "--config", "[bold]:cat:"], "--config [bold]:cat: cannot be read"),
]


@pytest.mark.parametrize(("arguments", "words"), MESSAGES, ids=range(len(MESSAGES)))
def test_one_message_and_exit_code_2(capsys, arguments, words):
    code, shown, error = call(capsys, *arguments)
    assert (code, shown) == (2, "") and words in error
    assert error.startswith("manifold-lora: ") and error.count("\n") == 1


def test_help_states_the_range(capsys):
    _, shown, _ = call(capsys, "train", "--help")
    shown = " ".join(shown.replace("│", "").split())
    assert "dropout (0 to 4294967295) (default: 0)" in shown


@pytest.mark.slow
def test_a_run_on_the_poorest_terminal_writes_all_files(tmp_path):
    """ASCII, 20 columns, no colour, and a reader that leaves before the training."""
    model = model_directory(tmp_path / "model")
    data = data_file(tmp_path / "Ω[bold]x[red]😀.jsonl")
    out = tmp_path / "Out😀"
    environment = os.environ | {
        "PYTHONIOENCODING": "ascii",
        "COLUMNS": "20",
        "TERM": "dumb",
        "NO_COLOR": "1",
        "XLA_FLAGS": xla_flags(devices=1),
    }
    settings = {"model": model, "data": data, "out": out, "rank": 2, "steps": 2}
    settings |= {"batch-size": 4, "targets": "q_proj"}
    process = subprocess.Popen(
        [*COMMAND, "train", *(f"--{name}={x}" for name, x in settings.items())],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    )
    assert process.stdout is not None and process.stderr is not None
    shown = b""
    while b"Out" not in shown and (line := process.stdout.readline()):
        shown += line
    process.stdout.close()
    error = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 0, error.decode()
    assert b"Traceback" not in error
    assert "?[bold]x[red]?.jsonl" in "".join(shown.decode("ascii").split())
    written = {path.name for path in out.iterdir()}
    assert {"adapter", "summary.json", "config.toml", "loss.png"} <= written


def test_platforms_that_are_not_there(tmp_path):
    done = subprocess.run(
        [*COMMAND, "inspect", str(tmp_path)],
        env=os.environ | {"JAX_PLATFORMS": "nonsense"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(
        "manifold-lora: JAX finds no nonsense (unset JAX_PLATFORMS)."
    )


@pytest.mark.skipif(sys.platform == "win32", reason="closes descriptors as in a shell")
def test_without_stdout_and_stderr():
    shell = ["sh", "-c", '"$@" methods >&- 2>&-', "sh", *COMMAND]
    assert subprocess.run(shell).returncode == 0
