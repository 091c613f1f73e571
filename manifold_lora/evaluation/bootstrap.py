"""Differences between two systems on the same records, with bootstrap intervals."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from manifold_lora.evaluation.measures import Measure, Row

LEVEL = 0.95


class Difference(NamedTuple):
    """How much larger a measure is, and the interval that holds 95 % of resamples."""

    value: float
    low: float
    high: float


def paired_bootstrap(
    sizes: Sequence[int], statistic: Callable[..., Any], resamples: int
) -> Difference:
    """A difference between two systems, with a percentile bootstrap interval.

    Records are resampled within each task, for both systems alike (Efron and
    Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13): the interval says
    how much the choice of records matters, not that of the training seed.

    Args:
        sizes: the number of records of every task.
        statistic: the difference, of arrays (resamples, records) of the indices of
            each task's records; (resamples,).
        resamples: how often to resample.
    """
    from scipy.stats import bootstrap

    def of_indices(*chosen: Any, axis: int = -1) -> Any:
        del axis  # records are last
        return statistic(*(np.asarray(x).astype(np.int64) for x in chosen))

    records = [np.arange(size)[None] for size in sizes]
    value = float(statistic(*records)[0])
    if min(sizes) < 2:  # nothing to resample
        return Difference(value, value, value)
    interval = bootstrap(
        [x[0] for x in records],
        of_indices,
        n_resamples=resamples,
        batch=100,  # of all at once the memory would be gigabytes
        vectorized=True,
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Difference(value, float(interval.low), float(interval.high))


def difference(
    measure: Measure, before: Sequence[Sequence[Row]], after: Sequence[Sequence[Row]]
) -> Difference:
    """The difference of a measure, averaged over tasks, with a paired bootstrap.

    Args:
        measure: a ratio of sums over records.
        before: the rows of each task, of the one system.
        after: those of the other, for the same records in the same order.
    """
    tasks: list[tuple[np.ndarray, np.ndarray]] = []  # changes of the sums, and below
    for first, second in zip(before, after, strict=True):
        over, per = map(np.array, measure.columns(first))
        tasks.append((np.array(measure.columns(second)[0]) - over, per))

    def statistic(*chosen: np.ndarray) -> np.ndarray:
        ratios = [
            change[i].sum(-1) / per[i].sum(-1)
            for (change, per), i in zip(tasks, chosen, strict=True)
        ]
        return np.mean(ratios, axis=0)

    return paired_bootstrap([len(rows) for rows in before], statistic, resamples=9999)
