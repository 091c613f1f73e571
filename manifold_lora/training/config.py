"""What one fine-tuning run is. Made of parts; complete and checked once it exists."""

import dataclasses
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from manifold_lora.adapters.config import AdapterConfig, LowRankConfig
from manifold_lora.adapters.options import (
    Role,
    describe_learning_rates,
)
from manifold_lora.checkpoints.adapter_file import read_adapter
from manifold_lora.configuration.flat import flatten, part
from manifold_lora.configuration.parts import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    LaunchConfig,
    ModelConfig,
    OptimizerConfig,
    OutputConfig,
    ScheduleConfig,
)
from manifold_lora.distributed.mesh import read_mesh
from manifold_lora.errors import InputError
from manifold_lora.settings import (
    UNSET,
    PositiveFloat,
    PositiveInt,
    decode,
    fill,
    raise_all,
    setting,
    validate,
)

_BATCH = {"batch_size": 16, "sequence_length": 512}
# The built-in examples are short and many.
_BUILTIN_BATCH = {"batch_size": 8, "sequence_length": 128}
_BUILTIN_STEPS = 600
_EPOCHS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What one run and the runs of a comparison have in common."""

    model: ModelConfig = part(ModelConfig)
    data: DataConfig = part(DataConfig)
    adapter: LowRankConfig = part(LowRankConfig)
    optimizer: OptimizerConfig = part(OptimizerConfig)
    schedule: ScheduleConfig = part(ScheduleConfig)
    batch: BatchConfig = part(BatchConfig)
    evaluation: EvaluationConfig = part(EvaluationConfig)
    output: OutputConfig = part(OutputConfig)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """A fine-tuning run.

    What is not given is filled in when it is made: learning rates from the method,
    the batch and the length of the run from the data.

    Args:
        learning_rate: of constrained factors, or of all where a method has one rate.
        initial_adapter: directory of an adapter to continue from; its settings are
            those of the run, but for the dropout, unless others are given.
        best_metric: held-out measure that decides which adapter is the best one.
        keep: which adapter becomes adapter/: the best trained one or the last one.
        patience: evaluations without improvement before stopping early.
        report: trackers beside metrics.jsonl.
        profile: directory for a trace of three steps and their costliest operations.
        show_batch: print one batch, trained tokens coloured, and stop.

    Raises:
        InputError: values out of range and settings that exclude each other.

    Examples:
        >>> config = TrainConfig(adapter=AdapterConfig("stella", rank=8))
        >>> config.learning_rate, config.schedule.steps, config.adapter.alpha
        (0.005, 600, 16)
    """

    adapter: AdapterConfig = part(AdapterConfig, roles=typing.get_args(Role))
    checkpoints: CheckpointConfig = part(CheckpointConfig)
    launch: LaunchConfig = part(LaunchConfig)

    learning_rate: PositiveFloat = setting(
        UNSET,
        "of constrained factors, or of all where a method has one rate",
        default_text=describe_learning_rates,
    )
    initial_adapter: Path | None = setting(
        None, "directory of an adapter to continue from", name="adapter"
    )
    best_metric: Literal["loss", "accuracy", "exact_match"] = setting(
        "loss", "held-out measure that decides which adapter is the best one"
    )
    keep: Literal["best", "last"] = setting(
        "best", "which adapter becomes adapter/: the best trained one or the last one"
    )
    patience: PositiveInt | None = setting(
        None, "evaluations without improvement before stopping early"
    )
    report: tuple[Literal["tensorboard", "wandb"], ...] = setting(
        (), "trackers beside metrics.jsonl: tensorboard, wandb", may_change=True
    )
    profile: Path | None = setting(
        None,
        "directory for a trace of three steps and their costliest operations",
        saved=False,
    )
    show_batch: bool = setting(
        False, "print one batch, trained tokens coloured, and stop", saved=False
    )

    def __post_init__(self):
        validate(self)
        if self.initial_adapter is not None and self.adapter == AdapterConfig():
            adapter = read_adapter(self.initial_adapter).config
            object.__setattr__(self, "adapter", adapter)
        builtin = not self.data.paths
        schedule = self.schedule
        if schedule.steps is None and schedule.epochs is None:
            length = {"steps": _BUILTIN_STEPS} if builtin else {"epochs": _EPOCHS}
            schedule = dataclasses.replace(schedule, **length)
        batch = fill(self.batch, **(_BUILTIN_BATCH if builtin else _BATCH))
        options = self.adapter.options
        rates = options.learning_rates.for_base(self.model.path is None)
        filled = {
            "learning_rate": rates
            if self.learning_rate is UNSET
            else self.learning_rate,
            "adapter": _with_free_rate(self.adapter, self.model.path is None),
            "data": fill(self.data, packing=True) if builtin else self.data,
            "batch": batch,
            "schedule": schedule,
        }
        for name, value in filled.items():
            object.__setattr__(self, name, value)
        raise_all(self._problems())

    @staticmethod
    def inherited(values: Mapping[str, Any]) -> dict[str, Any]:
        """What a run that continues from an adapter has from it, by flat name.

        Args:
            values: that are given, by flat name; `compose` prefers them.
        """
        try:
            path = decode(values.get("adapter"), Path | None)
        except ValueError:
            return {}  # `compose` reports it
        if path is None:
            return {}
        settings = flatten(read_adapter(path).config)
        found, needed = settings["method"], values.get("method")
        if needed not in (None, found):
            raise InputError(
                f"--adapter {path} does not match the run (method: found {found}, "
                f"needed {needed}). Leave --method out, or --adapter."
            )
        return settings

    def _problems(self) -> list[str]:
        problems = []
        try:
            read_mesh(self.launch.mesh)
        except InputError as error:
            problems.append(str(error))
        if self.schedule.steps is not None and self.schedule.epochs is not None:
            problems.append("--steps and --epochs exclude each other: give one")
        if self.batch.batch_size % self.batch.accumulate:
            problems.append(
                f"--batch-size {self.batch.batch_size} must be a multiple of "
                f"--accumulate {self.batch.accumulate}"
            )
        return problems

    @property
    def free_learning_rate(self) -> float | None:
        """The learning rate of the free factors, of methods with a second one."""
        return getattr(self.adapter.options, "free_learning_rate", None)

    @property
    def run_directory(self) -> Path:
        """Where the run is written: `--out`, or runs/METHOD."""
        return self.output.out or Path("runs") / self.adapter.method


def _with_free_rate(adapter: AdapterConfig, builtin: bool) -> AdapterConfig:
    """The adapter with the default of its second learning rate, where it has one."""
    rates = adapter.options.free_learning_rates
    if rates is None:
        return adapter
    options = fill(adapter.options, free_learning_rate=rates.for_base(builtin))
    return dataclasses.replace(adapter, options=options)
