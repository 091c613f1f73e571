"""Records a second and memory on a real model and data, beside TRL's SFTTrainer.

    python benchmarks/sft_trainer.py MODEL DATA [--arms ...] [--rounds 1]

MODEL is a Hugging Face LLaMA directory, DATA a JSON file of Alpaca records, such as the
commonsense benchmarks'. LoRA of rank 16 on all linears in float32; each arm runs in a
process of its own with its library's defaults but for what its name says, and reports
the median seconds of its steps after the first one, and its peak resident memory. A
record counts once, however it is padded or packed. Needs the extra hf.
"""

# pyright: reportMissingImports=false

import argparse
import importlib.metadata
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

ARMS: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours, remat block": {"remat": "block"},
    "SFTTrainer": {},
    "SFTTrainer, no checkpointing": {"gradient_checkpointing": False},
    "SFTTrainer, packing": {"packing": True, "max_length": 512},
    "SFTTrainer, padding-free": {"padding_free": True, "max_length": None},
}


def our_rate(model: Path, data: Path, steps: int, options: dict[str, Any]) -> float:
    """Records a second of `manifold-lora train`."""
    from manifold_lora import load_tokenizer
    from manifold_lora.cli.main import main
    from manifold_lora.configuration.parts import DataConfig
    from manifold_lora.training.config import TrainConfig
    from manifold_lora.training.data import load_data

    config = TrainConfig(data=DataConfig(paths=(data,)))
    examples = load_data(config, load_tokenizer(model)).train
    mean_tokens = sum(len(each.input_ids) for each in examples) / len(examples)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "run")
        words = ["train", "--model", model, "--data", data, "--method", "lora"]
        words += ["--out", out, "--steps", steps, "--eval-every", 0]
        words += [x for k, v in options.items() for x in (f"--{k}", v)]
        main([*map(str, words)])
        rows = [*map(json.loads, (out / "metrics.jsonl").read_text().splitlines())]
    return median(row["tokens_per_second"] for row in rows[1:]) / mean_tokens


def their_rate(model: Path, data: Path, steps: int, options: dict[str, Any]) -> float:
    """Records a second of SFTTrainer."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    torch.set_num_threads(os.cpu_count() or 1)
    rows = [
        {
            "prompt": [{"role": "user", "content": prompt(row)}],
            "completion": [{"role": "assistant", "content": row["output"]}],
        }
        for row in json.loads(data.read_text())
    ]
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *arguments: Any, **more: Any) -> None:
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder,
            max_steps=steps,
            save_strategy="no",
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
            bf16=False,
            **options,
        )
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
            processing_class=AutoTokenizer.from_pretrained(model),
            callbacks=[Clock()],
        )
        trainer.train()
    seconds = median(end - begin for begin, end in pairwise(ends))
    records = len(rows) / len(trainer.train_dataset)  # of a row, more than 1 if packed
    return records * arguments.per_device_train_batch_size / seconds


def prompt(row: dict[str, str]) -> str:
    """The instruction with its input."""
    return "\n".join(filter(None, (row["instruction"], row.get("input"))))


def main() -> None:
    """Run the arms in turns and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=[*ARMS])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measured = our_rate if options.measure.startswith("ours") else their_rate
        given = ARMS[options.measure]
        rate = measured(options.model, options.data, options.steps, given)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        print(json.dumps([rate, peak]))
        return
    names = ("jax", "torch", "transformers", "peft", "trl")
    print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in names))
    results: dict[str, list[list[float]]] = {arm: [] for arm in options.arms}
    for _ in range(options.rounds):
        for arm in options.arms:
            command = [sys.executable, __file__, str(options.model), str(options.data)]
            command += ["--steps", str(options.steps), "--measure", arm]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(done.stderr)
            results[arm].append(json.loads(done.stdout.splitlines()[-1]))
    print("| arm | records/s | peak MB |\n|---|---|---|")
    for arm, values in results.items():
        rate, peak = map(median, zip(*values, strict=True))
        print(f"| {arm} | {rate:.2f} | {peak:,.0f} |")


if __name__ == "__main__":
    main()
