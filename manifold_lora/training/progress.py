"""What a run knows beside its arrays: plain numbers, kept with every checkpoint."""

import dataclasses
import math
from typing import Any

from manifold_lora.evaluation.heldout import Evaluation


@dataclasses.dataclass
class Progress:
    """How far a run is, and what was best so far."""

    before: Evaluation  # of the adapter before the first step
    best: Evaluation
    best_step: int = 0
    step: int = 0
    waited: int = 0  # evaluations since the best one
    tokens: int = 0  # trained on, without padding
    largest_residual: float = 0.0
    last_residual: float = 0.0
    seconds: float = 0.0
    feed: dict[str, Any] | None = None  # where the data stands

    def to_json(self) -> dict[str, Any]:
        """As JSON can hold it; `from_json` gives the same again."""
        return dataclasses.asdict(self) | {
            "before": list(self.before),
            "best": list(self.best),
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Progress":
        """The progress that `to_json` was called on."""
        pairs: dict[str, Any] = {k: Evaluation(*values[k]) for k in ("before", "best")}
        return cls(**{**values, **pairs})

    def found(self, evaluation: Evaluation, metric: str) -> bool:
        """Take note of an evaluation after `step`; true where it is the best."""
        one, other = getattr(evaluation, metric), getattr(self.best, metric)
        better = one > other if metric == "accuracy" else one < other
        if better:
            self.best, self.best_step, self.waited = evaluation, self.step, 0
        else:
            self.waited += 1
        return better


def all_finite(metrics: dict[str, float]) -> bool:
    """Whether the loss and the gradient of a step are numbers."""
    return math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])
