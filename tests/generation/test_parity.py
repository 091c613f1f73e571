"""Ids agree with transformers' generate: greedy, beams, penalties, padded batches."""

# pyright: reportMissingImports=false

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from manifold_lora.checkpoints.huggingface import load_llama
from manifold_lora.data.tokens import load_tokenizer
from manifold_lora.generation.generate import generate
from manifold_lora.generation.padding import pad_prompts
from tests import smollm2
from tests.models import reference

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.hf

KINDS = ("llama-2", "llama-3.1", "llama-3.2")
LENGTHS = (3, 17, 1, 40, 8, 29)
SETTINGS = {
    "greedy": {},
    "penalty": {"repetition_penalty": 1.3},
    "beams": {"num_beams": 4},
    "beams with a penalty": {"num_beams": 3, "repetition_penalty": 1.2},
    "beams and length": {"num_beams": 4, "length_penalty": 0.3},
    "two beams, negative length": {"num_beams": 2, "length_penalty": -1.0},
}


def their_ids(
    path: Path, ids: np.ndarray, mask: np.ndarray, stop: list[int], **settings: Any
) -> np.ndarray:
    """The new ids of transformers, padded with 0 to the same width."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    ).eval()
    model.generation_config.eos_token_id = None
    tensors = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    width = settings["max_new_tokens"]
    with torch.no_grad():
        out = model.generate(
            **tensors,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=stop or None,
            **settings,
        )
    new = out[:, ids.shape[1] :].numpy()
    return np.pad(new, ((0, 0), (0, width - new.shape[1])))


def until(row: np.ndarray, stop: list[int]) -> list[int]:
    ends = [i for i, token in enumerate(row) if token in stop]
    return row[: ends[0] + 1].tolist() if ends else row.tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("stop", [[], [3, 11, 20]], ids=["endless", "stops"])
def test_ids_are_those_of_transformers(kind, name, stop, tmp_path):
    config = reference.CONFIGS[kind] | {"max_position_embeddings": 256}
    tensors = reference.random_tensors(config)
    path = reference.write_checkpoint(tmp_path / "m", config, tensors)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, config["vocab_size"], n).tolist() for n in LENGTHS]
    ids, mask = pad_prompts(prompts)
    settings = {"max_new_tokens": 64} | SETTINGS[name]
    needed = their_ids(path, ids.astype(np.int64), mask, stop, **settings)
    model = load_llama(path)
    got = generate(model, ids, attention_mask=mask, stop_tokens=stop, **settings)
    for ours, theirs in zip(got, needed, strict=True):
        assert until(ours, stop) == until(theirs, stop)


@pytest.mark.real
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("beams", [1, 4])
def test_smollm2_writes_what_it_writes_in_transformers(beams):
    path = smollm2.directory()
    tokenizer: Any = load_tokenizer(path)
    questions = (
        "What is the capital of France?",
        "Write a haiku about the sea, and then explain every line of it in detail.",
        "Please answer true or false: is water wet?",
        "List three prime numbers.",
    )
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
        )
        for question in questions
    ]
    ids, mask = pad_prompts(prompts)
    stop = [tokenizer.eos_token_id]
    settings = {"max_new_tokens": 64, "num_beams": beams}
    needed = their_ids(path, ids.astype(np.int64), mask, stop, **settings)
    model = load_llama(path)
    got = generate(model, ids, attention_mask=mask, stop_tokens=stop, **settings)
    for ours, theirs in zip(got, needed, strict=True):
        assert until(ours, stop) == until(theirs, stop)
