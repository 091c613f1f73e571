"""What all protocols have in common: tasks of records, and measures of predictions."""

import abc
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from manifold_lora.evaluation.bootstrap import Difference, difference
from manifold_lora.evaluation.measures import Measure, Row
from manifold_lora.evaluation.systems import System


class Suite(abc.ABC):
    """The tasks of an evaluation, and how a system is run on them.

    Attributes:
        sizes: the number of records of every task.
        digest: of all that decides the predictions, beside the settings.
        measures: ratios that the predictions are summarised by.
        notes: what was left out, to be shown.
    """

    sizes: Mapping[str, int]
    digest: str
    measures: tuple[Measure, ...] = ()
    notes: tuple[str, ...] = ()

    @abc.abstractmethod
    def predict(self, system: System, task: str, done: set[int]) -> Iterator[list[Row]]:
        """The predictions for the records of a task, batch after batch.

        Batches do not depend on `done`, so that an evaluation that was killed and
        resumed has the numbers of one that was not.

        Args:
            system: the model.
            task: its name.
            done: records with a prediction; batches of these alone are left out.
        """

    @abc.abstractmethod
    def describe(self, task: str, row: Row) -> tuple[str, str, str]:
        """Record, prediction and truth in words, for tables of changes."""

    @abc.abstractmethod
    def outcome(self, row: Row) -> Any:
        """What has changed between two systems if it is not equal."""

    def compare(
        self, before: Sequence[Sequence[Row]], after: Sequence[Sequence[Row]]
    ) -> dict[str, Difference]:
        """The differences of the measures, averaged over tasks, with intervals."""
        return {m.name: difference(m, before, after) for m in self.measures}

    def summarise(self, rows: Sequence[Row]) -> dict[str, float]:
        """The measures of the predictions of a task."""
        return {measure.name: measure.value(rows) for measure in self.measures}


def batched(
    lengths: Sequence[int], batch_size: int, done: set[int]
) -> Iterator[list[int]]:
    """Batches of records of similar length, the longest first, but those all done.

    >>> list(batched([5, 9, 7], 2, {0}))
    [[1, 2]]
    """
    ordered = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for start in range(0, len(ordered), batch_size):
        batch = ordered[start : start + batch_size]
        if not done.issuperset(batch):
            yield batch


def by_name(files: Sequence[Path]) -> dict[str, Path]:
    """Files by name, or by path where two have the same name.

    >>> list(by_name([Path("a/x.txt"), Path("b/y.txt"), Path("c/y.txt")]))
    ['x.txt', 'b/y.txt', 'c/y.txt']
    """
    names = [file.name for file in files]
    return {
        file.name if names.count(file.name) == 1 else str(file): file for file in files
    }
