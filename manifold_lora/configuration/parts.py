"""The parts that commands share. Each command's configuration is made of some of them.

The adapter's part is `adapters.config.AdapterConfig`. Fields that depend on other
settings are `UNSET` until the command's configuration fills them in.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta

from manifold_lora.distributed.launch import launch_problems
from manifold_lora.models.remat import RematSetting
from manifold_lora.settings import (
    UNSET,
    BatchSize,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    Seed,
    SequenceLength,
    raise_all,
    setting,
    validate,
)

Date = Annotated[
    str, Meta(pattern=r"^\d{4}-\d\d-\d\d$", description="a date such as 2026-01-31")
]


class Part:
    """A dataclass whose values are checked when it is made."""

    def __post_init__(self):
        validate(self)


@dataclasses.dataclass(frozen=True)
class BaseConfig(Part):
    """The base model."""

    path: Path | None = setting(
        None,
        "Hugging Face LLaMA directory",
        name="model",
        default_text="the small built-in base",
    )
    dtype: Literal["float32", "bfloat16"] | None = setting(
        None,
        "of the base and of its products",
        default_text="bfloat16 on accelerators, float32 on CPU",
    )
    base_dtype: Literal["int8", "nf4"] | None = setting(
        None,
        "what the base is stored in: its projections, and in int8 its embedding",
        default_text="--dtype",
    )


@dataclasses.dataclass(frozen=True)
class ModelConfig(BaseConfig):
    """The base model, to train adapters of."""

    remat: RematSetting = setting(
        "auto",
        "what layers compute again in the backward pass: as little as memory allows "
        "(auto), none, all but projections and attention (dots), all (block), or all, "
        "with their inputs in host memory (offload)",
    )


@dataclasses.dataclass(frozen=True)
class DataConfig(Part):
    """The examples."""

    paths: tuple[Path, ...] = setting(
        (),
        "JSON, CSV or Parquet files to train on, or directories of train, valid and "
        "test files",
        name="data",
        default_text="the built-in data",
    )
    eval_path: Path | None = setting(
        None,
        "held-out file",
        name="eval_data",
        default_text="the valid file of a directory, or a part of --data",
    )
    eval_examples: PositiveInt = setting(
        1000, "examples held out of --data, at most a tenth of it"
    )
    split_seed: Seed = setting(0, "decides which examples of --data are held out")
    skip_invalid: bool = setting(
        False, "leave out the records that cannot be used, and report them"
    )
    packing: bool | None = setting(
        None, "several examples per row", default_text="where it leaves less padding"
    )
    train_on_prompt: bool = setting(False, "compute the loss on prompts too")
    date: Date | None = setting(
        None,
        "date, as 2026-01-31, that chat templates write as today's",
        default_text="the day on which the run began",
    )


@dataclasses.dataclass(frozen=True)
class BatchConfig(Part):
    """The batch of an optimiser step."""

    batch_size: BatchSize = setting(
        UNSET,
        "examples of a step; rows, where they are packed",
        default_text="16; for the built-in data 8",
    )
    accumulate: PositiveInt = setting(
        1, "gradient-accumulation steps: micro-batches that a batch is split into"
    )
    sequence_length: SequenceLength = setting(
        UNSET,
        "tokens of a row at most; longer examples are truncated",
        default_text="512; for the built-in data 128",
    )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Part):
    """The optimiser, beside what is the method's own."""

    weight_decay: NonNegativeFloat = setting(
        0.0, "decoupled; without effect on orthonormal factors"
    )
    clip: NonNegativeFloat = setting(
        1.0, "largest global norm of the gradient; 0: no clipping"
    )
    seed: Seed = setting(0, "of the initialisation, the order of the data and dropout")


@dataclasses.dataclass(frozen=True)
class ScheduleConfig(Part):
    """The length of a run and its learning-rate schedule."""

    steps: PositiveInt | None = setting(
        None,
        "optimiser steps",
        default_text="by --epochs; for the built-in data 600",
    )
    epochs: PositiveInt | None = setting(
        None, "passes over the data, instead of --steps", default_text="3"
    )
    schedule: Literal["linear", "cosine", "constant"] = setting(
        "linear", "of the learning rate after the warm-up"
    )
    warmup_steps: NonNegativeInt = setting(
        20, "steps until the full learning rate, at most all but one"
    )


@dataclasses.dataclass(frozen=True)
class EvaluationConfig(Part):
    """Held-out evaluation during training."""

    eval_every: NonNegativeInt | None = setting(
        None,
        "steps between evaluations; 0: none",
        default_text="a quarter of the run; compare: a twelfth",
    )

    residual_every: PositiveInt = setting(
        10, "steps between measurements of the constraint violation"
    )


@dataclasses.dataclass(frozen=True)
class OutputConfig(Part):
    """What is written, and where."""

    out: Path | None = setting(
        None,
        "directory to write to",
        default_text="runs/METHOD; compare: runs/compare",
        saved=False,
    )
    overwrite: bool = setting(
        False, "restart, replacing what an earlier run wrote to --out", saved=False
    )
    base_id: str | None = setting(
        None, "name of the base in the adapter's files", default_text="--model"
    )
    export_format: Literal["portable", "peft"] = setting(
        "portable",
        "of the adapter: portable, for PEFT, vLLM, SGLang and llama.cpp alike, or "
        "peft, with rsLoRA and patterns as they are",
        may_change=True,
    )
    license: str | None = setting(
        None,
        "of the adapter, for its model card, such as apache-2.0",
        default_text="unknown",
        may_change=True,
    )


@dataclasses.dataclass(frozen=True)
class CheckpointConfig(Part):
    """Checkpoints to resume from."""

    checkpoint_every: PositiveInt | None = setting(
        None,
        "steps between checkpoints",
        default_text="250, and always at evaluations",
        may_change=True,
    )
    keep_checkpoints: PositiveInt = setting(
        2,
        "number of recent checkpoints to keep, beside the best one",
        may_change=True,
    )
    checkpoint_errors: Literal["stop", "continue"] = setting(
        "stop", "what to do when a checkpoint cannot be written", may_change=True
    )


@dataclasses.dataclass(frozen=True)
class LaunchConfig(Part):
    """Devices and processes."""

    mesh: str | None = setting(
        None,
        "sizes of the mesh axes, as in data=2,fsdp=4,tensor=2",
        default_text="all devices on fsdp",
        may_change=True,
    )
    coordinator: str | None = setting(
        None,
        "HOST:PORT of process 0",
        default_text="from the launcher, or one process",
        saved=False,
    )
    processes: PositiveInt | None = setting(
        None,
        "number of processes of the run",
        default_text="from the launcher, or one process",
        saved=False,
    )
    process_id: NonNegativeInt | None = setting(
        None,
        "index of this process, from 0",
        default_text="from the launcher",
        saved=False,
    )

    def __post_init__(self):
        validate(self)
        raise_all(launch_problems(self.coordinator, self.processes, self.process_id))
