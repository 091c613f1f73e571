"""Paired differences and their intervals against the normal approximation."""

import numpy as np
import pytest

from manifold_lora.evaluation.bootstrap import difference
from manifold_lora.evaluation.measures import Measure

ACCURACY = Measure("accuracy", "correct")
LOSS = Measure("loss", "nll", per="tokens")


def rows(values, **others):
    return [{"correct": int(v)} | others for v in values]


def test_interval_of_an_accuracy():
    rng = np.random.default_rng(1)
    before = rng.random(800) < 0.5
    after = np.where(rng.random(800) < 0.8, before, rng.random(800) < 0.7)
    found = difference(ACCURACY, [rows(before)], [rows(after)])
    change = after.astype(float) - before
    assert found.value == pytest.approx(change.mean())
    error = 1.96 * change.std() / np.sqrt(800)
    assert found.low == pytest.approx(change.mean() - error, abs=0.1 * error)
    assert found.high == pytest.approx(change.mean() + error, abs=0.1 * error)


def test_pairs_matter():
    """The same accuracies, of records that agree: there is no doubt."""
    same = rows([True, False] * 100)
    assert difference(ACCURACY, [same], [same]) == (0, 0, 0)
    other = difference(ACCURACY, [same], [rows([False, True] * 100)])
    assert other.value == 0 and other.low < -0.1 and other.high > 0.1


def test_interval_of_a_ratio_and_of_a_mean_over_tasks():
    rng = np.random.default_rng(2)
    tasks = []
    for size in (100, 400):
        tokens = rng.integers(1, 9, size)
        before, after = (tokens * rng.normal(mean, 0.3, size) for mean in (2, 1.5))
        tasks.append((tokens, before, after))

    def of(index):
        return [
            [{"nll": x, "tokens": n} for x, n in zip(t[index], t[0], strict=True)]
            for t in tasks
        ]

    found = difference(LOSS, of(1), of(2))
    ratios, variances = [], []
    for tokens, before, after in tasks:
        ratio = (after - before).sum() / tokens.sum()
        residual = after - before - ratio * tokens  # the delta method
        ratios.append(ratio)
        variances.append(residual.var() / len(tokens) / tokens.mean() ** 2)
    error = 1.96 * np.sqrt(sum(variances)) / 2
    assert found.value == pytest.approx(np.mean(ratios))
    assert found.low == pytest.approx(np.mean(ratios) - error, abs=0.15 * error)
    assert found.high == pytest.approx(np.mean(ratios) + error, abs=0.15 * error)


def test_one_record_has_no_interval():
    assert difference(ACCURACY, [rows([False])], [rows([True])]) == (1, 1, 1)
