"""Tiny models and tasks for the tests of evaluation, and what NumPy makes of them."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

import manifold_lora as ml
from manifold_lora.adapters import factors, set_factors
from tests.models.reference import logits
from tests.tiny import model_directory

BOOLQ = [
    ("is ice cold?", "true"),
    ("is fire cold?", "false"),
    ("do all birds swim?", "false"),
    ("is it so?", "true"),
    ("is two more than one, and one more than none?", "true"),
]
PIQA = [("boil an egg", "solution2"), ("tie a shoe", "solution1"), ("sit", "solution2")]


def model_with_adapter(folder: Path) -> tuple[Path, Path]:
    """A tiny model, and an adapter that changes what it says."""
    model_path = model_directory(folder / "model")
    model = ml.load_llama(model_path)
    ml.attach(model, ml.AdapterConfig("lora", rank=4, targets=["o_proj", "down_proj"]))
    rng = np.random.default_rng(0)
    large = {
        key: {
            name: {
                factor: jnp.asarray(rng.normal(0, 0.5, x.shape), jnp.float32)
                for factor, x in arrays.items()
            }
            for name, arrays in modules.items()
        }
        for key, modules in factors(model)["layers"].items()
    }
    set_factors(model, {"layers": large})
    ml.save_adapter(model, folder / "adapter")
    return model_path, folder / "adapter"


def instruction(text: str, labels: str) -> str:
    return f"Please answer: {text}\n\nAnswer format: {labels}"


def task_directory(folder: Path) -> Path:
    """BoolQ and PIQA in the form of LLM-Adapters, a few records each."""
    labels = {"boolq": "true/false", "piqa": "solution1/solution2"}
    for task, records in {"boolq": BOOLQ, "piqa": PIQA}.items():
        (folder / task).mkdir(parents=True, exist_ok=True)
        rows = [
            {
                "instruction": instruction(text, labels[task]),
                "input": "",
                "output": f"the correct answer is {answer}",
                "answer": answer,
            }
            for text, answer in records
        ]
        (folder / task / "test.json").write_text(json.dumps(rows))
    return folder


def log_probabilities(model: Path, ids: Any) -> np.ndarray:
    """Of every token after the first given those before, (t − 1, vocab), in float64."""
    tensors = load_file(model / "model.safetensors")
    config = json.loads((model / "config.json").read_text())
    x = logits(tensors, config, np.asarray(ids))[:-1]
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))
