"""A real pretrained model: its logits, its tokens, and what training makes of it."""

import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from manifold_lora.checkpoints.huggingface import load_llama
from manifold_lora.data.records import read_records
from manifold_lora.data.tokens import encode, load_tokenizer
from manifold_lora.generation.generate import generate
from manifold_lora.generation.padding import pad_prompts
from tests import smollm2
from tests.tolerances import LOGITS

pytestmark = [pytest.mark.real, pytest.mark.timeout(1200)]
CODE = "from manifold_lora.cli.main import main; main()"
METHODS = ("stiefel", "stella", "lora")


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> Path:
    """The training records of three commonsense tasks, in one file."""
    rows = []
    for task in ("ARC-Challenge", "ARC-Easy", "openbookqa"):
        rows += json.loads((smollm2.commonsense() / task / "train.json").read_text())
    file = tmp_path_factory.mktemp("data") / "commonsense.json"
    file.write_text(json.dumps(rows))
    return file


@pytest.mark.hf
def test_logits_are_those_of_transformers(records):
    torch = pytest.importorskip("torch")
    from transformers import LlamaForCausalLM

    path = smollm2.directory()
    tokenizer = load_tokenizer(path)
    examples, _ = encode(read_records(records)[:4], tokenizer, 256)
    theirs = LlamaForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    model = load_llama(path, jnp.float32)
    for example in examples:
        with torch.no_grad():
            ids = torch.tensor(example.input_ids[None].astype(np.int64))
            needed = theirs(ids).logits.numpy()
        logits = model(jnp.asarray(example.input_ids[None]))
        assert np.abs(logits - needed).max() < LOGITS * np.abs(needed).max()


def test_chats_are_those_of_the_template(records):
    tokenizer = load_tokenizer(smollm2.directory())
    chosen = list(islice(read_records(records), 0, None, 97))
    examples, report = encode(chosen, tokenizer, 1024)
    assert report.kept == len(chosen) == len(examples)
    for record, example in zip(chosen, examples, strict=True):
        messages = [{"role": t.role, "content": t.text} for t in record.turns]
        rendered = str(tokenizer.apply_chat_template(messages, tokenize=False))
        ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
        assert example.input_ids.tolist() == ids
        trained = tokenizer.decode(example.input_ids[example.loss_mask])
        assert trained == f"{record.completion}<|im_end|>"


def test_it_answers_in_bfloat16():
    """Greedy texts are text, and begin as those in float32."""
    path = smollm2.directory()
    tokenizer: Any = load_tokenizer(path)
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            return_dict=False,
        )
        for question in ("What is the capital of France?", "Name a primary colour.")
    ]
    ids, mask = pad_prompts(prompts)
    first, whole = (
        generate(load_llama(path, kind), ids, attention_mask=mask, max_new_tokens=n)
        for kind, n in ((jnp.float32, 1), (jnp.bfloat16, 24))
    )
    assert whole[:, 0].tolist() == first[:, 0].tolist()
    texts = tokenizer.batch_decode(whole, skip_special_tokens=True)
    assert "Paris" in texts[0] and "\ufffd" not in "".join(texts)


@pytest.mark.parametrize("method", METHODS[:1])
def test_training_learns(method, records, tmp_path):
    """15 steps of 4 x 256 tokens; `benchmarks/smollm2.py` takes 60, by all methods."""
    options = {
        "--model": smollm2.directory(),
        "--data": records,
        "--method": method,
        "--batch-size": 4,
        "--sequence-length": 256,
        "--steps": 15,
        "--eval-examples": 40,
        "--eval-every": 15,
        "--out": tmp_path / "run",
    }
    arguments = [str(x) for pair in options.items() for x in pair] + ["--packing"]
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}  # optimise well
    subprocess.run(
        [sys.executable, "-c", CODE, "train", *arguments], env=env, check=True
    )
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["loss_before"] > 1.5
    assert summary["loss_after"] < 0.5
    assert summary["largest_residual"] < 1e-6
