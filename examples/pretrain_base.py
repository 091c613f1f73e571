"""Pretrain the small English LLaMA that is included in `data/base`.

An example of full-parameter training with this library's model and plain Optax. The
texts are included in every Python installation: the language reference in
`pydoc_data.topics` and the docstrings of the standard library. The result is a Hugging
Face model directory with a tokenizer, for `load_llama` or transformers.

    python examples/pretrain_base.py --out base

The files in `data/base` were made this way with Python 3.11.7: 0.9 million parameters,
4.1 million tokens in 21 minutes on two busy CPU cores. The held-out loss went from 6.96
to 2.71 nats per token. Other Python versions have other texts, and give other models.
"""

import ast
import json
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from rich.console import Console
from rich.progress import track
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from manifold_lora.checkpoints.huggingface import save_llama
from manifold_lora.data.batches import batches
from manifold_lora.data.tokens import Example
from manifold_lora.models import Llama, LlamaConfig

SPECIAL = ("<pad>", "<s>", "</s>")  # ids 0, 1 and 2
CONFIG = LlamaConfig(
    vocab_size=1024,
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=512,
    tie_word_embeddings=True,
    bos_token_id=1,
    eos_token_id=(2,),
    pad_token_id=0,
)
ROWS, LENGTH = 8, 256  # 2,048 tokens per batch
PEAK = 3e-3  # peak learning rate, after the warm-up
HELD_OUT = 0.03  # fraction of the documents
CAPITALS = 0.5  # fraction of the documents that are repeated in capitals
NOT_PROSE = {"test", "tests", "idlelib", "site-packages", "dist-packages"}
Batch = dict[str, jax.Array]
console = Console()


def documents() -> list[str]:
    """Every distinct text, in an order that only depends on the Python version."""
    texts = [text for _, text in sorted(topics.items())]
    root = Path(sysconfig.get_path("stdlib"))
    for file in sorted(root.rglob("*.py")):
        if not NOT_PROSE.intersection(file.relative_to(root).parts):
            texts += docstrings(file)
    return list(dict.fromkeys(text for text in texts if text))


def docstrings(file: Path) -> Iterator[str]:
    """The docstrings in a source file, which is parsed but not executed."""
    try:
        tree = ast.parse(file.read_bytes())
    except SyntaxError:  # templates and deliberately broken files
        return
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, *functions)):
            yield ast.get_docstring(node) or ""


def split(texts: list[str], seed: int) -> tuple[list[str], list[str]]:
    """Training and held-out texts, some of them repeated in capitals."""
    rng = np.random.default_rng(seed)
    train, held_out = [], []
    is_held_out = rng.random(len(texts)) < HELD_OUT
    for text, is_out in zip(texts, is_held_out, strict=True):
        copies = [text, text.upper()] if rng.random() < CAPITALS else [text]
        (held_out if is_out else train).extend(copies)
    return train, held_out


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """A byte-level BPE tokenizer, which can encode any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG.vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def encode(texts: list[str], tokenizer: Tokenizer) -> list[Example]:
    """Examples of at most `LENGTH` tokens; all but the first token are targets."""
    examples = []
    for encoding in tokenizer.encode_batch(texts):
        ids = np.array([*encoding.ids, 2], np.int32)
        for piece in np.split(ids, range(LENGTH, len(ids), LENGTH)):
            examples.append(Example(piece, np.arange(len(piece)) > 0))
    return examples


def summed_loss(model: Llama, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """The sum of the cross-entropy over the targets, in nats, and their number."""
    ids = batch["input_ids"]
    packing = {key: batch[key] for key in ("positions", "segment_ids")}
    logits = model(ids, **packing)[:, :-1]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:])
    mask = batch["loss_mask"][:, 1:]
    return jnp.sum(losses * mask), jnp.sum(mask)


def write_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Write the tokenizer and the config files that transformers needs for it."""
    tokenizer.save(str(directory / "tokenizer.json"))
    tokens = dict(zip(("pad_token", "bos_token", "eos_token"), SPECIAL, strict=True))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # in transformers 4 and 5
        "model_max_length": CONFIG.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
    }
    generation = {f"{name}_id": i for i, name in enumerate(tokens)}
    for name, content in (("tokenizer", config | tokens), ("generation", generation)):
        file = directory / f"{name}_config.json"
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main(out: Path, steps: int = 2000, seed: int = 0) -> None:
    """Pretrain the base model.

    Args:
        out: Output directory, which must not exist.
        steps: Optimizer steps of 2,048 tokens.
        seed: Of the held-out documents, the weights and the order.
    """
    texts, held_out_texts = split(documents(), seed)
    tokenizer = train_tokenizer([*texts, *(text.upper() for text in texts)])
    train, held_out = encode(texts, tokenizer), encode(held_out_texts, tokenizer)

    model = Llama(CONFIG, rngs=nnx.Rngs(seed))
    model.remat = "none"  # small enough to keep its activations
    graph, params = nnx.split(model)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    tokens = sum(len(example.input_ids) for example in train)
    console.print(f"{parameters:,} parameters, {tokens:,} training tokens")
    rate = optax.warmup_cosine_decay_schedule(0, PEAK, steps // 20, steps, PEAK / 100)
    adamw = optax.adamw(rate, b2=0.95, weight_decay=0.1)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), adamw)

    def step(params: nnx.State, opt_state: optax.OptState, batch: Batch):
        def mean_loss(params: nnx.State) -> jax.Array:
            total, count = summed_loss(nnx.merge(graph, params), batch)
            return total / count

        loss, gradients = jax.value_and_grad(mean_loss)(params)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    step = jax.jit(step, donate_argnums=(0, 1))
    evaluate = jax.jit(lambda p, batch: summed_loss(nnx.merge(graph, p), batch))
    shape = {"batch_size": ROWS, "sequence_length": LENGTH, "packing": True}

    def report(params: nnx.State, when: str) -> None:
        rows = batches(held_out, seed=seed, shuffle=False, epochs=1, **shape)
        total, count = np.sum([evaluate(params, batch) for batch in rows], axis=0)
        console.print(f"held-out loss {when}: {total / count:.3f} nats per token")

    report(params, "before")
    opt_state = optimizer.init(params)
    rows = iter(batches(train, seed=seed, **shape))
    for number in track(range(1, steps + 1), "pretraining", console=console):
        params, opt_state, loss = step(params, opt_state, next(rows))
        if number % 250 == 0:
            console.print(f"step {number}: training loss {loss:.3f}")
    report(params, "after")
    save_llama(nnx.merge(graph, params), out, jnp.bfloat16)
    write_tokenizer(tokenizer, out)


if __name__ == "__main__":
    tyro.cli(main)
