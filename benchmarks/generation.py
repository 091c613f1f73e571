"""Tokens a second of generation, beside transformers on the same prompts.

    python benchmarks/generation.py MODEL [--batch-size 8] [--new-tokens 64]

MODEL is a Hugging Face LLaMA directory. Needs the extra hf. Both generate greedily in
float32, without stop tokens, from the same random prompts; rounds alternate, each
library uses all processors, and the table shows medians. The first round compiles, and
is left out.
"""

# pyright: reportMissingImports=false

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import manifold_lora as ml
from manifold_lora.generation import decode


def transformers_generate(path: Path, new_tokens: int) -> Callable[[np.ndarray], None]:
    """A function that generates with transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(os.cpu_count() or 1)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None

    def run(ids: np.ndarray) -> None:
        tensor = torch.tensor(ids.astype(np.int64))
        with torch.no_grad():
            model.generate(
                tensor,
                attention_mask=torch.ones_like(tensor),
                max_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
            )

    return run


def main() -> None:
    """Run both in turns and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    model = ml.load_llama(options.model)

    def ours(ids: np.ndarray) -> None:
        ml.generate(model, ids, max_new_tokens=options.new_tokens, stop_tokens=())

    runs = {
        "manifold_lora": ours,
        "transformers": transformers_generate(options.model, options.new_tokens),
    }
    rng = np.random.default_rng(0)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(options.rounds + 1):
        # Shorter by the number of the round: of the same bucket.
        shape = (options.batch_size, options.prompt_tokens - number)
        ids = rng.integers(5, model.config.vocab_size, shape)
        for name, run in runs.items():
            started = time.perf_counter()
            run(ids)
            if number:
                seconds[name].append(time.perf_counter() - started)
    tokens = options.batch_size * options.new_tokens
    rates = {name: tokens / median(times) for name, times in seconds.items()}
    print("| library | tokens/s |\n|---|---|")
    for name, rate in rates.items():
        print(f"| {name} | {rate:.1f} |")
    print(f"ratio {rates['manifold_lora'] / rates['transformers']:.2f}")
    functions: tuple[Any, ...] = (decode.begin, decode.advance)
    programs = sum(f._cache_size() for f in functions)
    print(f"{programs} programs compiled for {options.rounds + 1} prompt lengths")


if __name__ == "__main__":
    main()
