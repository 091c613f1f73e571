"""The types of compare.json, which msgspec checks when it is read."""

from typing import Annotated, Any, NotRequired, TypedDict

from msgspec import Meta

Count = Annotated[int, Meta(ge=0, le=2**53)]
Positive = Annotated[float, Meta(gt=0)]
Share = Annotated[float, Meta(ge=0, le=1)]
Rates = Annotated[list[Positive], Meta(min_length=1, max_length=2)]
MeanAndSpread = Annotated[list[float], Meta(min_length=2, max_length=2)]


class Point(TypedDict):
    """A held-out loss during a run."""

    step: Count
    loss: float


class Measures(TypedDict):
    """The fields of `Evaluation`."""

    loss: float
    accuracy: Share
    exact_match: Share


class Result(TypedDict):
    """One run; the keys that are not required are those of a run that converged."""

    method: str
    rank: Count
    trainable: Count
    rates: Rates
    seed: Count
    steps: Count
    diverged: bool
    losses: Annotated[list[float | None], Meta(min_length=1)]  # None: NaN or infinite
    curve: list[Point]
    step_seconds: float
    final: NotRequired[Measures]
    largest_residual: NotRequired[float]
    last_residual: NotRequired[float]
    effective_rank_b: NotRequired[float]
    least_effective_rank_b: NotRequired[float]
    effective_rank_update: NotRequired[float]


class ToBaseline(TypedDict):
    """When the mean curve of a method reaches the final loss of the baseline."""

    steps_to_baseline: float | None
    share_of_steps: float | None
    seconds_to_baseline: float | None


class Row(TypedDict):
    """A method in the table; if every run diverged, only what is required is there."""

    method: str
    rank: Count
    parameters: Count
    rates: Rates
    at_edge: bool  # a best rate is the smallest or the largest that was tried
    seeds: Count
    diverged: Count
    overhead: float
    step_seconds: float
    loss: NotRequired[MeanAndSpread]
    accuracy: NotRequired[MeanAndSpread]
    exact_match: NotRequired[MeanAndSpread]
    training_loss: NotRequired[MeanAndSpread]
    largest_residual: NotRequired[float]
    last_residual: NotRequired[float]
    effective_rank_b: NotRequired[MeanAndSpread]
    least_effective_rank_b: NotRequired[float]
    effective_rank_update: NotRequired[MeanAndSpread]
    steps_to_baseline: NotRequired[float | None]
    share_of_steps: NotRequired[float | None]
    seconds_to_baseline: NotRequired[float | None]
    training: NotRequired[ToBaseline]


class HeldOut(TypedDict):
    """Numbers of held-out examples."""

    validation: Count  # that the rates are chosen on
    test: Count  # that the results are measured on
    test_is_eval_data: bool  # or else held out of the data, as the validation part is


class Content(TypedDict):
    """What compare.json holds."""

    settings: dict[str, Any]
    cells: dict[str, Result]  # by `run_name`
    held_out: NotRequired[HeldOut]
    step_seconds: NotRequired[dict[str, Positive]]
    best: NotRequired[dict[str, Rates]]
    summary: NotRequired[list[Row]]
