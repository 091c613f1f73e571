"""The measures of held-out examples against NumPy, however they are batched."""

import math
import weakref
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import manifold_lora as ml
from manifold_lora.adapters import axes, split
from manifold_lora.data.records import Record
from manifold_lora.data.tokens import Example, encode, load_tokenizer
from manifold_lora.evaluation.batches import HeldOutBatches
from manifold_lora.evaluation.heldout import (
    Evaluation,
    answer,
    evaluation_sums,
    first_turn,
    majority,
    make_evaluate,
)
from manifold_lora.models import Llama
from manifold_lora.training.config import TrainConfig
from manifold_lora.training.optimizer import build_optimizer
from manifold_lora.training.step import initial_state, make_step
from tests.cases import slow_but
from tests.models.reference import CONFIGS, logits, random_tensors, write_checkpoint
from tests.tiny import model_directory
from tests.tolerances import FLOAT32

pytestmark = pytest.mark.usefixtures("quick_compilation")
CONFIG = CONFIGS["llama-2"]


class Case:
    """A model, examples that it predicts in part, and their logits in float64."""

    def __init__(self, folder: Path):
        tensors = random_tensors(CONFIG)
        self.model = ml.load_llama(write_checkpoint(folder / "model", CONFIG, tensors))
        self.model.remat = "none"
        ml.attach(self.model, ml.AdapterConfig("lora", rank=2, targets=["q_proj"]))
        self.rebuild, self.factors, self.frozen = split(self.model)
        self.examples, self.logits = [], []
        rng = np.random.default_rng(0)
        for number, length in enumerate([5, 33, 9, 17, 6, 12, 8]):
            ids = rng.integers(0, 61, 3)
            while len(ids) < length:  # odd examples are greedy, the others in part
                greedy = logits(tensors, CONFIG, ids)[-1].argmax()
                use = number % 2 or rng.random() < 0.5
                ids = np.append(ids, greedy if use else rng.integers(0, 61))
            mask = np.arange(length) >= 3
            if number > 4:  # two answers
                mask[4] = False
            example = Example(ids.astype(np.int32), np.arange(length) > 0, mask)
            self.examples.append(example)
            self.logits.append(logits(tensors, CONFIG, ids))

    def evaluate(
        self, tokens: int, examples: list[Example] | None = None
    ) -> Evaluation:
        batches = HeldOutBatches(examples or self.examples, tokens, 512)
        measure = make_evaluate(self.rebuild, axes(self.model))
        return measure(self.factors, self.frozen, batches)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("case"))


def test_measures_are_those_of_numpy(case: Case):
    nll: list[float] = []
    correct: list[bool] = []
    exact: list[bool] = []
    for example, x in zip(case.examples, case.logits, strict=True):
        log_p = x - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True))
        log_p -= x.max(-1, keepdims=True)
        places = np.flatnonzero(example.answer_mask)
        true = example.input_ids[places]
        nll += (-log_p[places - 1, true]).tolist()
        hits = x[places - 1].argmax(-1) == true
        correct += hits.tolist()
        exact.append(bool(hits.all()))
    found = case.evaluate(tokens=100)
    assert found.loss == pytest.approx(np.mean(nll), rel=FLOAT32)
    assert found.accuracy == np.mean(correct)
    assert found.exact_match == np.mean(exact)
    assert 0 < found.exact_match < found.accuracy < 1
    assert found.perplexity == pytest.approx(np.exp(np.mean(nll)), rel=1e-4)


def test_measures_do_not_depend_on_the_micro_batches(case: Case):
    first, *others = [case.evaluate(tokens) for tokens in (1, 64, 150, 999)]
    for other in others:
        assert other.loss == pytest.approx(first.loss, rel=1e-6)
        assert other[1:] == first[1:]
    reordered = case.evaluate(64, case.examples[::-1])
    assert reordered.loss == pytest.approx(first.loss, rel=1e-6)


def test_only_answers_are_measured_whatever_is_trained(tmp_path: Path):
    tokenizer = load_tokenizer(model_directory(tmp_path / "model"))
    records = [
        Record(prompt=f"{p}:", completion=c) for p, c in ["ab", "cb", "db", "ef"]
    ]
    on_answers, _ = encode(records, tokenizer, 16)
    on_all, _ = encode(records, tokenizer, 16, train_on_prompt=True)
    assert on_all[0].loss_mask.sum() > on_all[0].answer_mask.sum()
    for one, other in zip(on_answers, on_all, strict=True):
        assert answer(one) == answer(other)
        for x, y in zip(first_turn(one), first_turn(other), strict=True):
            np.testing.assert_array_equal(x, y)
    assert majority(on_all, on_all) == 0.75
    for one, other in zip(
        HeldOutBatches(on_answers, 16, 16), HeldOutBatches(on_all, 16, 16), strict=True
    ):
        jax.tree.map(np.testing.assert_array_equal, one, other)


def test_perplexity_of_any_loss():
    assert Evaluation(2.0, 0, 0).perplexity == math.exp(2)
    assert math.isfinite(Evaluation(1e5, 0, 0).perplexity)
    assert math.isnan(Evaluation(math.nan, 0, 0).perplexity)


def test_batches_have_every_example_once_in_few_shapes():
    rng = np.random.default_rng(1)
    examples = [
        Example(np.full(n, i + 1, np.int32), np.ones(n, bool))
        for i, n in enumerate(rng.integers(2, 101, 50))
    ]
    batches = list(HeldOutBatches(examples, tokens=416, sequence_length=512))
    shapes = [batch["input_ids"].shape for batch in batches]
    assert shapes == sorted(shapes, key=lambda shape: -shape[1])
    assert 1 < len(set(shapes)) <= 4
    assert all(rows == 416 // length for rows, length in shapes)
    rows = [row[row > 0] for batch in batches for row in batch["input_ids"]]
    rows = sorted((row for row in rows if len(row)), key=lambda row: row[0])
    for row, example in zip(rows, examples, strict=True):
        np.testing.assert_array_equal(row, example.input_ids)
    padded = sum(batch["input_ids"].size for batch in batches)
    assert padded < 1.5 * sum(len(row) for row in rows) < 104 * 50


def test_the_longest_row_is_no_longer_than_allowed():
    examples = [Example(np.ones(n, np.int32), np.ones(n, bool)) for n in (30, 3)]
    batches = list(HeldOutBatches(examples, tokens=20, sequence_length=30))
    assert [batch["input_ids"].shape for batch in batches] == [(1, 30), (2, 8)]
    with pytest.raises(ml.InputError, match="30 tokens, more than the 29"):
        list(HeldOutBatches(examples, tokens=20, sequence_length=29))


def test_two_batches_at_most_are_on_the_devices(case: Case):
    """The one that is evaluated, and the next."""
    alive: list[Any] = []
    most = 0

    def on_devices():
        nonlocal most
        for batch in HeldOutBatches(case.examples * 3, 1, sequence_length=512):
            put = jax.tree.map(jnp.asarray, batch)
            alive.append(weakref.ref(put["input_ids"]))
            most = max(most, sum(ref() is not None for ref in alive))
            yield put
            del put

    make_evaluate(case.rebuild, axes(case.model))(
        case.factors, case.frozen, on_devices()
    )
    assert len(alive) == 21 and most <= 2


@pytest.mark.parametrize("accumulate", slow_but([4], [1, 4]))
def test_evaluation_takes_no_more_memory_than_a_training_step(accumulate: int):
    config = ml.LlamaConfig(
        vocab_size=2048,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    model = Llama(config, rngs=nnx.Rngs(0))
    adapter = ml.AdapterConfig("stiefel", rank=4, targets=["q_proj", "down_proj"])
    ml.attach(model, adapter)
    rebuild, factors, frozen = split(model)
    tags, names = ml.manifold_tree(model), axes(model)
    tx, _ = build_optimizer(TrainConfig(adapter=adapter), tags, 10, 64)
    state = initial_state(factors, tx, names, 0)

    def batch(rows: int, length: int) -> dict[str, jax.Array]:
        whole = jnp.ones((rows, length), jnp.int32)
        names = ("input_ids", "loss_mask", "positions", "segment_ids")
        return dict.fromkeys(names, whole)

    def bytes_of(program: Any, *arguments: Any) -> int:
        compiled = program.lower(*arguments).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    step = make_step(rebuild, tx, tags, names, accumulate)
    training = bytes_of(step, state, frozen, batch(8, 64))
    sums = evaluation_sums(rebuild, names)
    rows = 8 // accumulate
    for shape in ((rows, 64), (2 * rows, 32), (max(rows // 2, 1), 128)):
        assert 0 < bytes_of(sums, factors, frozen, batch(*shape)) <= training
