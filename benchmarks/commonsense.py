"""The commonsense protocol on a real model: the table, and the same after kills.

    python benchmarks/commonsense.py MODEL TASKS --adapter DIR --examples 500 --kills 3

MODEL is a Hugging Face directory, TASKS a directory of NAME/test.json files in the form
of LLM-Adapters, of which --task chooses some. The evaluation runs once to its end, and
once more, killed by SIGKILL after random numbers of predictions and started again each
time. Both must have the same predictions and the same scores.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CODE = "from manifold_lora.cli.main import main; main()"


def command(options: argparse.Namespace, tasks: Path, out: Path) -> list[str]:
    """The evaluation into a directory."""
    words = [sys.executable, "-c", CODE, "evaluate", "--model", str(options.model)]
    words += ["--tasks", str(tasks), "--protocol", options.protocol]
    words += ["--examples", str(options.examples), "--out", str(out)]
    words += ["--batch-size", str(options.batch_size)]
    words += ["--beams", str(options.beams)]
    if options.adapter:
        words += ["--adapter", *map(str, options.adapter)]
    return words


def run_with_kills(words: list[str], predictions: Path, counts: list[int]) -> int:
    """Run a command, killed whenever it has written so many predictions.

    Returns:
        How often it was killed before its end.
    """
    killed = 0
    for count in counts:
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
        while process.poll() is None and lines(predictions) < count:
            time.sleep(0.1)
        time.sleep(random.uniform(0, 2))  # into the next batch
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            killed += 1
        process.wait()
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    return killed


def lines(file: Path) -> int:
    """The lines of a file, which may not be there yet."""
    return file.read_bytes().count(b"\n") if file.is_file() else 0


def results(out: Path) -> Any:
    """The predictions and scores of an evaluation, without its times."""
    rows = [json.loads(x) for x in (out / "predictions.jsonl").read_text().splitlines()]
    for row in rows:
        del row["seconds"]
    rows.sort(key=lambda row: (row["system"], row["task"], row["record"]))
    summary = json.loads((out / "evaluation.json").read_text())
    for system in summary["systems"].values():
        del system["seconds"]
    return rows, summary


def main() -> None:
    """Print the table, and compare it with that of the killed evaluation."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("tasks", type=Path)
    parser.add_argument("--task", nargs="+", default=["boolq"])
    parser.add_argument("--adapter", type=Path, nargs="*")
    parser.add_argument("--protocol", default="stella")
    parser.add_argument("--examples", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--beams", type=int, default=4)
    parser.add_argument("--kills", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for task in options.task:
            source = options.tasks / task / "test.json"
            (folder / "tasks" / task).mkdir(parents=True)
            (folder / "tasks" / task / "test.json").write_bytes(source.read_bytes())
        started = time.perf_counter()
        whole, killed = folder / "whole", folder / "killed"
        words = command(options, folder / "tasks", whole)
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - started
        print((whole / "table.md").read_text())
        print(f"{seconds:.0f} s in all, with loading and compilation.")
        if options.kills:
            total = lines(whole / "predictions.jsonl")
            counts = sorted(random.sample(range(total), options.kills))
            words = command(options, folder / "tasks", killed)
            count = run_with_kills(words, killed / "predictions.jsonl", counts)
            same = results(whole) == results(killed)
            print(f"Killed {count} times: the same predictions and scores: {same}.")
            sys.exit(not same)


if __name__ == "__main__":
    main()
