"""Train a real pretrained model, SmolLM2-135M-Instruct, with several methods.

    python benchmarks/smollm2.py MODEL DATA [--methods stiefel stella lora] [--steps 60]

MODEL is the Hugging Face directory, DATA one or more files of commonsense records. Each
method runs `manifold-lora train` with 4 rows of 256 packed tokens and its default
learning rates; the table shows held-out measures before and after, on the same 100
examples.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

CODE = "from manifold_lora.cli.main import main; main()"


def run(method: str, options: argparse.Namespace, out: Path) -> dict:
    """The summary of one run."""
    command = [sys.executable, "-c", CODE, "train", "--packing"]
    command += ["--model", str(options.model), "--method", method, "--out", str(out)]
    command += ["--data", *map(str, options.data), "--steps", str(options.steps)]
    command += ["--batch-size", "4", "--sequence-length", "256"]
    command += ["--eval-examples", "100", "--eval-every", str(options.steps)]
    subprocess.run(command, check=True)
    return json.loads((out / "summary.json").read_text())


def main() -> None:
    """Run the methods and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path, nargs="+")
    parser.add_argument("--methods", nargs="+", default=["stiefel", "stella", "lora"])
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [(m, run(m, options, Path(folder, m))) for m in options.methods]
    measures = ("loss", "accuracy", "exact_match")
    names = [f"{x}_{when}" for x in measures for when in ("before", "after")]
    print("| method |", " | ".join([*names, "largest_residual", "seconds"]), "|")
    print("|---" * (len(names) + 3) + "|")
    for method, summary in rows:
        values = [f"{summary[name]:.4f}" for name in names]
        values += [f"{summary['largest_residual']:.1e}", f"{summary['seconds']:.0f}"]
        print(f"| {method} |", " | ".join(values), "|")


if __name__ == "__main__":
    main()
