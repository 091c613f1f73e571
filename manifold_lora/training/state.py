"""All that changes during a run, saved with every checkpoint."""

import math
from typing import Any, NamedTuple

from manifold_lora.evaluation.heldout import Evaluation
from manifold_lora.training.step import TrainState


class RunState(NamedTuple):
    """The arrays of a run, and how far it is, in plain numbers."""

    arrays: TrainState  # factors, optimiser state and PRNG key
    initial: Evaluation | None = None  # before the first step
    best: Evaluation | None = None  # of the trained adapters
    last: Evaluation | None = None
    best_step: int = 0  # 0: none is trained and evaluated yet
    step: int = 0
    evaluations_since_best: int = 0
    tokens: int = 0  # trained on, without padding
    largest_violation: float = 0.0  # of the manifolds' constraints, over all steps
    last_violation: float = 0.0
    seconds: float = 0.0
    data_state: dict[str, Any] | None = None  # of the batch iterator

    def after_step(self, arrays: TrainState) -> "RunState":
        """With the arrays of one more step."""
        return self._replace(arrays=arrays, step=self.step + 1)

    def measured(self, tokens: int, violation: float | None) -> "RunState":
        """With what was measured of a step."""
        run = self._replace(tokens=self.tokens + tokens)
        if violation is None:
            return run
        largest = max(self.largest_violation, violation)
        return run._replace(last_violation=violation, largest_violation=largest)

    def after_evaluation(self, evaluation: Evaluation, metric: str) -> "RunState":
        """With an evaluation of the current step, which may be the best one."""
        if better(evaluation, self.best, metric):
            return self._replace(
                last=evaluation,
                best=evaluation,
                best_step=self.step,
                evaluations_since_best=0,
            )
        count = self.evaluations_since_best + 1
        return self._replace(last=evaluation, evaluations_since_best=count)

    def paused(self, seconds: float, data_state: dict[str, Any]) -> "RunState":
        """With the time spent so far and the state of the batch iterator."""
        return self._replace(seconds=seconds, data_state=data_state)

    def to_json(self) -> dict[str, Any]:
        """All but the arrays, as JSON can hold it; `from_json` is the inverse."""
        return {k: value for k, value in self._asdict().items() if k != "arrays"}

    @classmethod
    def from_json(cls, arrays: TrainState, values: dict[str, Any]) -> "RunState":
        """The state of these arrays that `to_json` was called on."""
        evaluations = {
            k: Evaluation(*values[k]) for k in ("initial", "best", "last") if values[k]
        }
        return cls(**{**values, **evaluations}, arrays=arrays)


def better(new: Evaluation, old: Evaluation | None, metric: str) -> bool:
    """Whether an evaluation is better than another one, by this metric."""
    if old is None:
        return True
    one, other = getattr(new, metric), getattr(old, metric)
    return one < other if metric == "loss" else one > other


def all_finite(metrics: dict[str, float]) -> bool:
    """Whether the loss and the gradient norm of a step are finite."""
    return math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])
