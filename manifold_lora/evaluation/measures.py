"""Rows of predictions, and ratios that they are summarised by."""

from collections.abc import Sequence
from typing import Any, NamedTuple

Row = dict[str, Any]  # of predictions.jsonl: what a system made of a record


class Measure(NamedTuple):
    """A ratio of sums over records: of a key of their rows, per another key."""

    name: str
    over: str
    per: str | None = None  # None: per record

    def columns(self, rows: Sequence[Row]) -> tuple[list[float], list[float]]:
        """Numerator and denominator of every row."""
        below = [1.0 if self.per is None else float(row[self.per]) for row in rows]
        return [float(row[self.over]) for row in rows], below

    def value(self, rows: Sequence[Row]) -> float:
        """The ratio.

        >>> Measure("loss", "nll", per="tokens").value([{"nll": 3.0, "tokens": 2}])
        1.5
        """
        over, per = self.columns(rows)
        return sum(over) / sum(per)
