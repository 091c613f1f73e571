"""Log-likelihoods of continuations against NumPy in float64."""

from pathlib import Path

import numpy as np
import pytest

import manifold_lora as ml
from manifold_lora.data.tokens import load_tokenizer
from manifold_lora.evaluation.likelihood import Likelihoods
from manifold_lora.evaluation.systems import System
from tests.evaluation.cases import log_probabilities
from tests.tiny import model_directory
from tests.tolerances import FLOAT32

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_directory(tmp_path_factory.mktemp("likelihood") / "model")


@pytest.fixture(scope="module")
def likelihoods(path: Path) -> Likelihoods:
    system = System(ml.load_llama(path), load_tokenizer(path), path)
    return Likelihoods(system, batch_size=3)


def pairs(path: Path) -> list[tuple[list[int], list[int]]]:
    """Of many lengths; several share all but their last token; some are greedy."""
    rng = np.random.default_rng(0)
    made = []
    for context, continuation in [(1, 1), (40, 1), (5, 9), (30, 33), (2, 2)]:
        ids = rng.integers(2, 258, context + continuation).tolist()
        made.append((ids[:context], ids[context:]))
    context, continuation = made[2]
    made += [(context, [*continuation[:-1], last]) for last in (7, 8, 9)]
    made.append(made[2])
    made.append((made[2][0][:4], made[2][0][4:] + made[2][1]))  # another split
    greedy: list[int] = []
    for _ in range(3):
        ids = [*context, *greedy, 0]
        greedy.append(int(log_probabilities(path, ids)[-1].argmax()))
    return [*made, (context, greedy), (context, [*greedy[:-1], 5])]


def test_likelihoods_are_those_of_numpy(path: Path, likelihoods: Likelihoods):
    cases = pairs(path)
    greedy = []
    for (context, continuation), answer in zip(cases, likelihoods(cases), strict=True):
        ids = [*context, *continuation]
        scores = log_probabilities(path, ids)[len(context) - 1 :]
        needed = scores[np.arange(len(continuation)), continuation].sum()
        assert answer.logprob == pytest.approx(needed, rel=FLOAT32)
        assert answer.greedy == (scores.argmax(-1) == continuation).all()
        greedy.append(answer.greedy)
    assert greedy[-2] and not greedy[-1]


def test_lengths_within_a_bucket_need_no_new_program(likelihoods: Likelihoods):
    run = likelihoods._run
    likelihoods([([3] * 33, [4, 5])])
    compiled = run._cache_size()
    likelihoods([([3] * 45, [6, 7])])
    likelihoods([([3] * 40, [6, 7]), ([3] * 41, [6, 7])])
    assert run._cache_size() == compiled
