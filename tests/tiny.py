"""A tiny LLaMA directory and data files, for tests of whole runs."""

import json
from pathlib import Path

from flax import nnx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from manifold_lora.checkpoints.huggingface import save_llama
from manifold_lora.models import Llama, LlamaConfig

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
CONFIG = LlamaConfig(
    vocab_size=2 + len(ALPHABET),
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    bos_token_id=0,
    eos_token_id=(1,),
)


def model_directory(path: Path, seed: int = 0, config: LlamaConfig = CONFIG) -> Path:
    """A Hugging Face directory of a random byte-level LLaMA with a tokenizer."""
    save_llama(Llama(config, rngs=nnx.Rngs(seed)), path)
    vocab = {"<s>": 0, "</s>": 1} | {c: i + 2 for i, c in enumerate(ALPHABET)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


def data_file(path: Path, count: int = 40) -> Path:
    """Prompts with one of two answers, which the prompt's first letter decides."""
    records = [
        {"prompt": f"{'ab'[i % 2]}{i}:", "completion": ["yes", "no"][i % 2]}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
