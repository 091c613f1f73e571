"""A benchmark of small public tasks, and a LLaMA pretrained from scratch for it.

The tasks are BoolQ, ARC, OpenBookQA and E2E, in the files of LLM-Adapters and of LoRA's
authors: `commonsense/TASK/{train,test}.json`, lists of `{"instruction",
"output", "answer"}`, and `e2e/valid.txt`, lines of `meaning||reference`. Run from the
root of the repository,

    python -m examples.studies.benchmark_base DATA_DIR --out DIR

writes into DIR:

- `train.jsonl` and `held_out.jsonl`, for --data and --eval-data of `manifold-lora`;
- `commonsense_test.jsonl` and `e2e_test.jsonl`, for `benchmark_scores.py` only;
- `base/`, a Hugging Face LLaMA with its tokenizer, pretrained from scratch on the
  Python documentation, on the training questions without answers, and on the training
  references without meanings: it has seen the language of the tasks, but not the tasks,
  and no held-out text.

With Python 3.11 and --seed 0: 21,220 training records of 66 tokens on average, of which
1,036 lose the beginning of their prompt in rows of 128; 1,600 and 474 test records. The
base has 3.7 million parameters and was trained on 4.6 million tokens (1.9 million
distinct) in 30 minutes on one CPU core, at 2,574 tokens/s. The loss on the held-out 2 %
of the texts went from 7.67 to 2.33 nats per token. The model is far too small to know
the answers: expect accuracies near chance.
"""

import json
import tempfile
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from examples import pretrain_base as smaller
from examples.pretrain_base import LENGTH, Batch, documents, summed_loss
from manifold_lora.checkpoints.huggingface import save_llama
from manifold_lora.data.batches import batches
from manifold_lora.data.records import read_records
from manifold_lora.data.tokens import encode, load_tokenizer
from manifold_lora.models import Llama

TASKS = ("boolq", "ARC-Easy", "ARC-Challenge", "openbookqa")
VALIDATION = 100  # records of each task in held_out.jsonl, and twice as many of E2E
CONFIG = replace(
    smaller.CONFIG,  # four layers, and the special tokens
    vocab_size=2048,
    hidden_size=256,
    intermediate_size=768,
    num_attention_heads=8,
    num_key_value_heads=4,
)
STEPS, ROWS = 2300, 8  # batches of 8 × 256 = 2,048 tokens
PEAK, HELD_OUT = 2e-3, 0.02  # peak learning rate; held-out fraction of the texts
CHECKPOINT = 575  # steps between intermediate models
SEQUENCE_LENGTH = 128  # for the number of truncated records
Rows = list[dict[str, str]]
console = Console()


def read_tasks(data: Path, cap: int, rng: np.random.Generator) -> tuple[Rows, ...]:
    """Training, validation and test records of the multiple-choice tasks."""
    train, validation, test = Rows(), Rows(), Rows()
    held_out_stems = set[str]()
    for task in TASKS:
        for split in ("test", "train"):
            file = data / "commonsense" / task / f"{split}.json"
            rows: Rows = json.loads(file.read_text(encoding="utf-8"))
            order = rng.permutation(len(rows)).tolist()
            if split == "train":
                records = [record(rows[i]) for i in order]
                validation += records[:VALIDATION]
                train += records[VALIDATION:]
                continue
            held_out_stems |= {stem(record(row)) for row in rows}
            for row in (rows[i] for i in order[:cap]):
                test.append({"task": task, **record(row), "answer": row["answer"]})
    # Some questions of ARC and OpenBookQA are in both files.
    validation = [row for row in validation if stem(row) not in held_out_stems]
    held_out_stems |= {stem(row) for row in validation}
    return [row for row in train if stem(row) not in held_out_stems], validation, test


def record(row: dict[str, str]) -> dict[str, str]:
    """A record without the 54 tokens of the template for instruction+output."""
    return {"prompt": row["instruction"] + "\n\n", "completion": row["output"]}


def stem(row: dict[str, str]) -> str:
    """The question of a record without its options."""
    return row["prompt"].split("question: ", 1)[-1].split("\n\n")[0].strip().lower()


def read_e2e(data: Path, rng: np.random.Generator) -> tuple[Rows, ...]:
    """Training, validation and test records of E2E, with disjoint meanings."""
    records = defaultdict[str, Rows](list)
    for line in (data / "e2e" / "valid.txt").read_text(encoding="utf-8").splitlines():
        meaning, reference = line.split("||")
        row = {"prompt": f"{meaning}\n", "completion": reference.strip()}
        records[meaning].append(row)
    meanings = sorted(records)
    tenth, order = len(meanings) // 10, rng.permutation(len(meanings))
    test, validation, train = (
        [row for i in indices for row in records[meanings[i]]]
        for indices in np.split(order, [tenth, tenth + tenth // 2])
    )
    validation = shuffled(validation, rng)[: 2 * VALIDATION]
    # Some sentences are references of several meanings.
    held_out = {row["completion"] for row in test + validation}
    return [row for row in train if row["completion"] not in held_out], validation, test


def shuffled(rows: Rows, rng: np.random.Generator) -> Rows:
    """The rows in random order."""
    return [rows[i] for i in rng.permutation(len(rows)).tolist()]


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """A byte-level BPE tokenizer, which can encode any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG.vocab_size,
        special_tokens=list(smaller.SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def write(file: Path, rows: Rows, tokenizer: Tokenizer) -> None:
    """Write records, encode them as in training, and print their lengths."""
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    file.write_text("".join(lines), encoding="utf-8")
    with tempfile.TemporaryDirectory() as directory:
        smaller.write_tokenizer(tokenizer, Path(directory))
        loaded = load_tokenizer(directory)
    _, report = encode(read_records(file), loaded, SEQUENCE_LENGTH)
    console.print(
        f"{file.name}: {report.kept:,} records of {report.tokens / report.kept:.0f} "
        f"tokens on average, {report.longest} at most; {report.truncated:,} lose the "
        f"beginning of their prompt at {SEQUENCE_LENGTH}",
        soft_wrap=True,
    )


def pretrain(texts: list[str], tokenizer: Tokenizer, out: Path, seed: int) -> None:
    """Train a LLaMA on texts and save it as out/base."""
    is_held_out = np.random.default_rng(seed).random(len(texts)) < HELD_OUT
    train, held_out = (
        smaller.encode([texts[i] for i in np.flatnonzero(mask)], tokenizer)
        for mask in (~is_held_out, is_held_out)
    )
    model = Llama(CONFIG, rngs=nnx.Rngs(seed))
    model.remat = "none"  # small enough to keep its activations
    graph, params = nnx.split(model)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    tokens = sum(len(example.input_ids) for example in train)
    console.print(f"{size:,} parameters, {tokens:,} training tokens")
    rate = optax.warmup_cosine_decay_schedule(0, PEAK, STEPS // 20, STEPS, PEAK / 100)
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

    def save(params: nnx.State, name: str) -> None:
        save_llama(nnx.merge(graph, params), out / name, jnp.bfloat16)
        smaller.write_tokenizer(tokenizer, out / name)

    report(params, "before")
    opt_state = optimizer.init(params)
    rows = batches(train, seed=seed, **shape)
    started, seen = time.perf_counter(), 0
    for number, batch in zip(range(1, STEPS + 1), rows, strict=False):
        params, opt_state, loss = step(params, opt_state, batch)
        seen += int((batch["segment_ids"] > 0).sum())
        if number % 100 == 0:
            speed = seen / (time.perf_counter() - started)
            console.print(f"step {number}: loss {loss:.3f}, {speed:.0f} tokens/s")
        if number % CHECKPOINT == 0 and number < STEPS:
            save(params, f"base-step{number}")
    report(params, "after")
    save(params, "base")


def main(
    data: tyro.conf.Positional[Path],
    out: Path,
    cap: int = 400,
    held_out: int = 600,
    seed: int = 0,
) -> None:
    """Write the benchmark and pretrain its base.

    Args:
        data: Directory with commonsense/ and e2e/.
        out: Output directory, which must not contain a base.
        cap: Maximum number of test records per task.
        held_out: Number of records in held_out.jsonl; the rest of 600 are unused.
        seed: Of the split, the held-out texts, the weights and the order.
    """
    if (out / "base").exists():
        raise SystemExit(f"{out / 'base'} already exists: choose another directory.")
    out.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    train, validation, test = read_tasks(data, cap, rng)
    e2e_train, e2e_validation, e2e_test = read_e2e(data, rng)
    texts = documents() + [row["prompt"].strip() for row in train]
    texts += [row["completion"] for row in e2e_train]
    tokenizer = train_tokenizer(texts)
    write(out / "train.jsonl", shuffled(train + e2e_train, rng), tokenizer)
    chosen = shuffled(validation + e2e_validation, rng)[:held_out]
    write(out / "held_out.jsonl", chosen, tokenizer)
    write(out / "commonsense_test.jsonl", test, tokenizer)
    write(out / "e2e_test.jsonl", e2e_test, tokenizer)
    pretrain(texts, tokenizer, out, seed)


if __name__ == "__main__":
    tyro.cli(main)
