"""Differences between two systems on the same records, with bootstrap intervals."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from manifold_lora.evaluation.measures import Measure, Row

LEVEL, RESAMPLES = 0.95, 9999


class Difference(NamedTuple):
    """How much larger a measure is, and the interval that holds 95 % of resamples."""

    value: float
    low: float
    high: float


def difference(
    measure: Measure, before: Sequence[Sequence[Row]], after: Sequence[Sequence[Row]]
) -> Difference:
    """The difference of a measure, averaged over tasks, with a paired bootstrap.

    Records are resampled within each task, for both systems alike (Efron and
    Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13): the interval says
    how much the choice of records matters, not that of the training seed.

    Args:
        measure: a ratio of sums over records.
        before: the rows of each task, of the one system.
        after: those of the other, for the same records in the same order.
    """
    from scipy.stats import bootstrap

    tasks: list[tuple[np.ndarray, np.ndarray]] = []  # changes of the sums, and below
    for first, second in zip(before, after, strict=True):
        over, per = map(np.array, measure.columns(first))
        tasks.append((np.array(measure.columns(second)[0]) - over, per))

    def statistic(*chosen: Any, axis: int = -1) -> Any:
        ratios = [
            change[i].sum(axis) / per[i].sum(axis)
            for (change, per), i in zip(tasks, map(_integers, chosen), strict=True)
        ]
        return np.mean(ratios, axis=0)

    records = [np.arange(len(change)) for change, _ in tasks]
    value = float(statistic(*records))
    if min(map(len, records)) < 2:  # nothing to resample
        return Difference(value, value, value)
    interval = bootstrap(
        records,
        statistic,
        n_resamples=RESAMPLES,
        batch=100,  # of all at once the memory would be gigabytes
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Difference(value, float(interval.low), float(interval.high))


def _integers(x: Any) -> np.ndarray:
    return np.asarray(x).astype(np.int64)
