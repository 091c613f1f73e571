"""Two-process runs: same losses as one process, a single writer, no hangs."""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from manifold_lora.distributed import processes
from manifold_lora.errors import InputError
from tests import command
from tests.cases import slow_but
from tests.tiny import data_file, model_directory
from tests.tolerances import FLOAT32

SETTINGS: dict[str, Any] = {
    "method": "stella",
    "rank": 4,
    "targets": ("q_proj", "down_proj"),
    "batch_size": 8,
    "eval_every": 3,
    "checkpoint_every": 2,
    "learning_rate": 2e-2,
    "warmup_steps": 1,
    "dropout": 0.1,
    "steps": 6,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    model, data = folder / "model", folder / "train.jsonl"
    return {"model": model_directory(model), "data": data_file(data)}


def free_port(ports: Iterable[int] = (0,)) -> int:
    """The first of the ports that is free; 0 is any."""
    for port in ports:
        with socket.socket() as listening, contextlib.suppress(OSError):
            listening.bind(("127.0.0.1", port))
            return listening.getsockname()[1]
    raise OSError("none of the ports is free")


def start_two(
    settings: Mapping[str, Any], other: Mapping[str, Any] | None = None, **env: str
) -> list[subprocess.Popen[str]]:
    """Start two processes of two devices; `other` and `env` are for the second only."""
    cluster = {"coordinator": f"127.0.0.1:{free_port()}", "processes": 2}
    started = []
    for process_id, changes in enumerate(({}, other or {})):
        changes = {**cluster, "process_id": process_id, **changes}
        arguments = command.flags({**settings, **changes})
        variables = env if process_id else {}
        started.append(command.start("train", *arguments, devices=2, **variables))
    return started


def rows(out: Path) -> list[dict[str, Any]]:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_two_processes_equal_one(files: dict[str, Path], tmp_path: Path):
    settings = {**SETTINGS, **files, "mesh": "data=2,fsdp=2"}
    two = start_two({**settings, "out": tmp_path / "two"})
    (code, output), (other, quiet) = map(command.end, two)
    assert (code, other) == (0, 0), output + quiet
    assert "4: 2 data, 2 fsdp; 2 processes" in output
    assert "held-out loss" in output and "held-out loss" not in quiet
    one = {**settings, "out": tmp_path / "one"}
    code, output = command.end(command.start("train", *command.flags(one), devices=4))
    assert code == 0, output

    actual, expected = rows(tmp_path / "two"), rows(tmp_path / "one")
    assert [row["step"] for row in actual] == [row["step"] for row in expected]
    for row, same in zip(actual, expected, strict=True):
        for name in row.keys() & {"loss", "eval_loss", "grad_norm", "eval_accuracy"}:
            assert row[name] == pytest.approx(same[name], rel=10 * FLOAT32), name
    summaries = [
        json.loads((tmp_path / name / "summary.json").read_text())
        for name in ("two", "one")
    ]
    assert summaries[0]["tokens"] == summaries[1]["tokens"]  # of all processes
    adapters = [
        load_file(tmp_path / name / "adapter/adapter_model.safetensors")
        for name in ("two", "one")
    ]
    assert adapters[0].keys() == adapters[1].keys()
    for name, x in adapters[0].items():
        np.testing.assert_allclose(x, adapters[1][name], atol=10 * FLOAT32)
    files_of_two = {p.name for p in (tmp_path / "two").iterdir()}
    assert files_of_two == {p.name for p in (tmp_path / "one").iterdir()}


# One process reads its data and begins its first evaluation later than CPU devices wait
# for each other to connect, which is 30 seconds.
LATE = """
import os, sys, time
sys.path.insert(0, os.getcwd())
from manifold_lora.training import train
def late(part):
    function, seconds = getattr(train, part), [40]
    def waits(*arguments):
        while seconds:
            time.sleep(seconds.pop())
        return function(*arguments)
    setattr(train, part, waits)
late("load_data")
late("report_evaluation")
"""


@pytest.mark.slow
def test_a_process_may_be_late(files: dict[str, Path], tmp_path: Path):
    (tmp_path / "sitecustomize.py").write_text(LATE)
    settings = {**SETTINGS, **files, "out": tmp_path / "run", "steps": 2}
    started = time.monotonic()
    two = start_two({**settings, "mesh": "data=2,fsdp=2"}, PYTHONPATH=str(tmp_path))
    for code, output in map(command.end, two):
        assert code == 0, output
    assert time.monotonic() - started > 80


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_dead_process_ends_the_other_and_the_run_resumes(
    files: dict[str, Path], tmp_path: Path, victim: int
):
    out = tmp_path / "run"
    settings = {**SETTINGS, **files, "out": out, "steps": 2000, "eval_every": 0}
    two = start_two(settings)
    manifest = out / "checkpoints" / "2" / "manifest.json"
    command.wait(lambda: manifest.exists() or two[victim].poll() is not None)
    two[victim].send_signal(signal.SIGKILL)
    start = time.monotonic()
    code, output = command.end(two[1 - victim])
    assert time.monotonic() - start < 60
    assert code not in (0, 2), output
    assert "lost contact with the others" in output or "another task died" in output
    command.end(two[victim])
    if victim == 1:  # resume on fewer devices
        steps = max(int(p.parent.name) for p in out.glob("checkpoints/*/manifest.json"))
        shutil.rmtree(out / "checkpoints" / str(steps + 2), ignore_errors=True)
        text = (out / "config.toml").read_text()
        (out / "config.toml").write_text(
            text.replace("steps = 2000", f"steps = {steps + 2}")
        )
        settings |= {"steps": steps + 2}
        code, output = command.end(command.start("train", *command.flags(settings)))
        assert code == 0, output
        assert "Resuming from the checkpoint of step" in output


def test_processes_with_different_configuration_data_or_code(
    files: dict[str, Path], tmp_path: Path
):
    other = data_file(tmp_path / "other.jsonl", count=38)
    package = Path(processes.__file__).parent.parent
    shutil.copytree(package, tmp_path / "code" / package.name)
    with (tmp_path / "code" / package.name / "errors.py").open("a") as file:
        file.write("# another version\n")
    two = start_two(
        {**SETTINGS, **files, "out": tmp_path / "run"},
        {"data": other, "seed": 1},
        PYTHONPATH=str(tmp_path / "code"),
        PYTHONSAFEPATH="1",  # otherwise the working directory comes first
    )
    for code, output in map(command.end, two):
        assert code == 2, output
        for content in ("configuration", "data", "code"):
            message = f"{content} of process 1 differs from that of process 0"
            assert message in " ".join(output.split())
        assert "Traceback" not in output
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_sigterm_to_one_process_stops_both_after_the_same_step(
    files: dict[str, Path], tmp_path: Path
):
    out = tmp_path / "run"
    settings = {**SETTINGS, **files, "out": out, "steps": 2000, "eval_every": 0}
    two = start_two(settings)
    manifest = out / "checkpoints" / "2" / "manifest.json"
    command.wait(lambda: manifest.exists() or two[1].poll() is not None)
    two[1].send_signal(signal.SIGTERM)
    (code, output), (other, quiet) = map(command.end, two)
    assert (code, other) == (143, 143), output + quiet
    last = rows(out)[-1]["step"]
    assert f"checkpoints/{last} is written" in " ".join(output.split())
    assert (out / "checkpoints" / str(last) / "manifest.json").exists()


LAUNCHERS = {
    "slurm": lambda number, port: {
        "SLURM_JOB_ID": str(port),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(number),
        "SLURM_LOCALID": str(number),
        "SLURM_STEP_NUM_NODES": "1",
    },
    "open-mpi": lambda number, port: {
        "OMPI_MCA_orte_hnp_uri": f"{port * 2**12}.0;tcp://127.0.0.1:34911",
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": str(number),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(number),
    },
}
CONNECT = """
from manifold_lora.distributed import processes
processes.initialise()
import jax
print("connected", jax.process_index(), jax.process_count(), jax.device_count())
processes.wait_for_all("end")
"""


@pytest.mark.parametrize("launcher", slow_but(["slurm"], LAUNCHERS))
def test_processes_of_a_launcher_connect(launcher: str):
    # Both launchers make port 61440 + n % 4096 out of the job's number n.
    port = free_port(random.sample(range(61440, 65536), 20))
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", CONNECT],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | flags | LAUNCHERS[launcher](number, port),
        )
        for number in range(2)
    ]
    for number, (code, output) in enumerate(map(command.end, started)):
        assert code == 0, output
        assert f"connected {number} 2 4" in output


@pytest.mark.parametrize(
    ("env", "several"),
    [
        ({}, False),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, False),  # sbatch, not srun
        ({"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "a"}, False),
        ({"SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "a"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
    ],
)
def test_launchers_are_detected_by_their_variables(monkeypatch, env, several):
    for name in list(os.environ):
        if name.startswith(("SLURM", "OMPI", "TPU")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(processes.glob, "glob", lambda pattern: [])
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert processes._launched_as_several() == several


def test_process_id_out_of_range():
    with pytest.raises(InputError, match="--process-id must be 0 to 1 .*got 2"):
        processes.initialise("127.0.0.1:1", 2, 2)


def test_incomplete_coordinator_flags():
    with pytest.raises(
        InputError, match="could not connect to each other.*--coordinator"
    ):
        processes.initialise(processes=2, process_id=0)
